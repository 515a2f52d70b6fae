"""Linear layers, where almost all of the time goes: the layout of the weights, which decides who multiplies.

On a CPU `compute.kernels` chooses. With it weights are packed in panels for this project's own kernels
(`compiled_linear.py`, and for whole layers `compiled_layers.py`): these read a matrix at the memory's speed for a few
tokens, and take no longer than oneDNN for many, much less where the CPU has AMX. Without it weights are in the blocked
layout of oneDNN, which is faster than MKL's row-major kernels of `F.linear` at almost any number of tokens. Bfloat16,
and int8 on a CPU without AMX, are kept in both layouts: oneDNN has instructions for many tokens by such weights.

Quantized weights are those of `quantized.py`. Kernels don't quantize a token's inputs; by int8 in AMX tiles these have
24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.cluster import Quantization
from stitch_server.model.quantized import (
    TYPICAL_TOKENS,
    PackedInt8Linear,
    PlainInt4Linear,
    PlainInt8Linear,
    rounded,
    to_int4,
)
from stitch_server.model.weights import AS_STORED, PACKED_DTYPES, WeightFormat, has_onednn

if TYPE_CHECKING:
    from stitch_server.model.compiled_linear import CompiledLinear

# `[tokens, inputs]` to a new tensor `[tokens, outputs]`.
Linear = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None = None, weight_format: WeightFormat = AS_STORED) -> Linear:
    """Makes the layer x → x · weightᵀ + bias, with weight `[outputs, inputs]` and bias `[outputs]`.

    Keeps its own copy of the weight where that is faster. Gradients go through to x, not to the weight; compiled and
    quantized layers have none.
    """
    if weight_format.is_rounded:
        return _library_linear(rounded(weight, weight_format.quantization), bias, "none")
    if not weight_format.uses_kernels(weight.device, weight.dtype):
        return _library_linear(weight, bias, weight_format.quantization)
    # Imported here, since the compiler takes a second to load.
    from stitch_server.model.compiled_linear import CompiledLinear

    compiled = CompiledLinear.of(weight, bias, weight_format)
    if not weight_format.keeps_two_layouts(weight.device, weight.dtype):
        return compiled
    return TwoLayoutLinear(_library_linear(weight, bias, weight_format.quantization), compiled)


def _library_linear(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Linear:
    """Makes a layer that PyTorch or oneDNN multiplies by."""
    if quantization == "int8":
        return _int8_linear(weight, bias)
    if quantization == "int4":
        return PlainInt4Linear(to_int4(weight), bias)
    if weight.dtype not in PACKED_DTYPES or not has_onednn(weight.device, weight.dtype):
        return PlainLinear(weight, bias)
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS), bias)


def _int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    # Older CPUs add pairs of products in 16 bits, which may overflow.
    exact = has_onednn(weight.device) and torch.cpu._is_vnni_supported()
    return (PackedInt8Linear if exact else PlainInt8Linear).quantized(weight, bias)


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A linear layer by the weight in PyTorch's layout."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer by the weight in oneDNN's layout; the operators are those that `torch.compile` uses."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            differentiable: Tensor = _Differentiable.apply(x, self)  # type: ignore[no-untyped-call]
            return differentiable
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """Returns x · weightᵀ + bias, without a trace for gradients."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


@dataclass(frozen=True, slots=True)
class TwoLayoutLinear:
    """A linear layer by the weight in the layout of oneDNN for many tokens, and in panels for a few."""

    many: Linear
    few: CompiledLinear

    def __call__(self, x: Tensor) -> Tensor:
        return self.few(x) if self.few.is_faster_for(x) else self.many(x)


class _Differentiable(torch.autograd.Function):
    """A packed layer with its derivative, which oneDNN's operators lack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_linear: PackedLinear) -> Tensor:
        ctx.packed = packed_linear.packed
        return packed_linear.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.packed.to_dense(), None
