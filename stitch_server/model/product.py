"""Hidden states times a weight matrix: where almost all of the time goes. Doesn't know what a product is for.

On a processor the matrix is kept in the blocked layout of oneDNN. A product of one row then reads it at nearly the
speed of the memory, and one of many rows is faster as well: on one AMD core with AVX-512, float32, a matrix of
3,072 x 576 takes as long as MKL's row-major kernels behind `F.linear` divided by 2 to 3, at any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# `[tokens, inputs]` to a new tensor `[tokens, outputs]`.
Product = Callable[[Tensor], Tensor]

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# The number of rows that the layout is chosen for; layouts for 8, 64 and 512 measured alike.
TYPICAL_ROWS = 8


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """x → x · weightᵀ + bias, with weight `[outputs, inputs]` and bias `[outputs]`.

    Keeps its own copy of the weight where that is faster. Gradients go through to x, not to the weight.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if has_onednn and weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES:
        return PackedProduct(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS), bias)
    return PlainProduct(weight, bias)


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """The matrix as PyTorch keeps it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """The matrix as oneDNN keeps it; the operators are those that `torch.compile` uses."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            differentiable: Tensor = _Differentiable.apply(x, self)  # type: ignore[no-untyped-call]
            return differentiable
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """The product alone, without a trace for gradients."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class _Differentiable(torch.autograd.Function):
    """A packed product with its derivative, which oneDNN's operators lack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_product: PackedProduct) -> Tensor:
        ctx.packed = packed_product.packed
        return packed_product.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.packed.to_dense(), None
