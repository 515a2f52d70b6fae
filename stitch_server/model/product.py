"""Hidden states times a weight matrix: where almost all of the time goes. Doesn't know what a product is for.

Without loops a processor's matrix is kept in the blocked layout of oneDNN, which is faster than MKL's row-major kernels
behind `F.linear` at almost any number of rows.

With loops it is kept in panels, for a product that is compiled here (`looped.py`). That reads a matrix at the memory's
speed for a few rows, and takes no longer than oneDNN for many, where a processor has tiles much less. Lean layers have
theirs in a stack (`stack.py`). Bfloat16, and bytes where there are no tiles, are kept in both ways: processors have
instructions for many such rows, which oneDNN uses.

Quantized matrices are those of `quantized.py`. Loops leave the rows as they are, for bytes in tiles to 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.cluster import Compute, Quantization
from stitch_server import processor
from stitch_server.loops.words import GROUP, WORDS
from stitch_server.model.quantized import (
    TYPICAL_ROWS,
    PackedInt8Product,
    PlainFoursProduct,
    PlainInt8Product,
    in_bytes,
    in_fours,
)

if TYPE_CHECKING:
    from stitch_server.model.looped import LoopProduct

# `[tokens, inputs]` to a new tensor `[tokens, outputs]`.
Product = Callable[[Tensor], Tensor]

PACKED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How matrices are kept."""

    quantization: Quantization = "none"
    # On a processor, for compiled loops.
    loops: bool = False

    @classmethod
    def of(cls, compute: Compute) -> Keeping:
        """As the cluster file says."""
        return cls(compute.quantization, compute.loops)

    @property
    def of_head(self) -> Keeping:
        """The head's matrix chooses the tokens: four bits are too few for it."""
        return replace(self, quantization="int8") if self.quantization == "int4" else self

    def bits(self, dtype: torch.dtype) -> int:
        """Of a weight that is read as `dtype`, scales of bytes left aside."""
        if self.quantization == "int4":
            return 32 * WORDS // GROUP
        return 8 if self.quantization == "int8" else 8 * dtype.itemsize

    def has_loops(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether loops multiply by matrices there."""
        return self.loops and device.type == "cpu" and dtype in PACKED_DTYPES

    def keeps_twice(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a matrix there is kept in two ways: for a few rows and for many."""
        if not self.has_loops(device, dtype):
            return False
        if self.quantization != "none":
            return self.quantization == "int8" and not processor.has_tiles()
        return dtype != torch.float32 and _has_onednn(device)


PLAINLY = Keeping()


def product(weight: Tensor, bias: Tensor | None = None, keeping: Keeping = PLAINLY) -> Product:
    """x → x · weightᵀ + bias, with weight `[outputs, inputs]` and bias `[outputs]`.

    Keeps its own copy of the weight where that is faster. Gradients go through to x, not to the weight; loops and
    quantized products have none.
    """
    if not keeping.has_loops(weight.device, weight.dtype):
        return _once(weight, bias, keeping.quantization)
    # Only who needs it pays for loading the compiler.
    from stitch_server.model.looped import LoopProduct

    looped = LoopProduct.of(weight, bias, keeping)
    if not keeping.keeps_twice(weight.device, weight.dtype):
        return looped
    return TwiceKeptProduct(_once(weight, bias, keeping.quantization), looped)


def _once(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Product:
    if quantization == "int8":
        return _int8_product(weight, bias)
    if quantization == "int4":
        return PlainFoursProduct(in_fours(weight), bias)
    if not _has_onednn(weight.device) or weight.dtype not in PACKED_DTYPES:
        return PlainProduct(weight, bias)
    return PackedProduct(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS), bias)


def _has_onednn(device: torch.device) -> bool:
    """Whether matrices there are kept in its layout."""
    return torch.backends.mkldnn.is_available() and device.type == "cpu"  # type: ignore[no-untyped-call]


def _int8_product(weight: Tensor, bias: Tensor | None) -> Product:
    # Older processors add pairs of products in 16 bits, which may be too few.
    exact = _has_onednn(weight.device) and torch.cpu._is_vnni_supported()
    return (PackedInt8Product if exact else PlainInt8Product).quantized(weight, bias)


def kept_rows(weight: Tensor, keeping: Keeping) -> tuple[Tensor, Tensor | None]:
    """What loops read of a weight, and a scale for each output where it has one."""
    if keeping.quantization == "int4":
        return in_fours(weight), None
    return in_bytes(weight) if keeping.quantization == "int8" else (weight, None)


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


@dataclass(frozen=True, slots=True)
class TwiceKeptProduct:
    """The matrix as it is best for many rows, and once more for a few of them."""

    many: Product
    few: LoopProduct

    def __call__(self, x: Tensor) -> Tensor:
        return self.few(x) if self.few.suits(x) else self.many(x)


class _Differentiable(torch.autograd.Function):
    """A packed product with its derivative, which oneDNN's operators lack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_product: PackedProduct) -> Tensor:
        ctx.packed = packed_product.packed
        return packed_product.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.packed.to_dense(), None
