"""Linear layers, where almost all of the time goes: in which layout weights are kept, and so who multiplies.

On a processor the choice is `compute.kernels`. With it weights are packed in panels for this project's own kernels
(`compiled_linear.py`, and for whole layers `compiled_layers.py`): these read a matrix at the memory's speed for a few
rows, and take no longer than oneDNN for many, where a processor has AMX much less. Without it they are in the blocked
layout of oneDNN, which is faster than MKL's row-major kernels behind `F.linear` at almost any number of rows. Bfloat16,
and int8 where there is no AMX, are kept in both layouts: oneDNN has instructions for many such rows.

Quantized weights are those of `quantized.py`. Kernels don't quantize the rows; by int8 in AMX tiles they have 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.cluster import ComputeConfig, Quantization
from stitch_server import cpu
from stitch_server.cpu import INT4_BITS_PER_GROUP, INT4_GROUP
from stitch_server.model.quantized import (
    TYPICAL_ROWS,
    PackedInt8Linear,
    PlainInt4Linear,
    PlainInt8Linear,
    to_int4,
    to_int8,
)

if TYPE_CHECKING:
    from stitch_server.model.compiled_linear import CompiledLinear

# `[tokens, inputs]` to a new tensor `[tokens, outputs]`.
Linear = Callable[[Tensor], Tensor]

PACKED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How weights are kept."""

    quantization: Quantization = "none"
    # On a processor: packed for this project's kernels.
    kernels: bool = False

    @classmethod
    def of(cls, compute: ComputeConfig) -> WeightFormat:
        """As the cluster file says."""
        return cls(compute.quantization, compute.kernels)

    @property
    def for_head(self) -> WeightFormat:
        """The head's matrix chooses the tokens: four bits are too few for it."""
        return replace(self, quantization="int8") if self.quantization == "int4" else self

    def bits(self, dtype: torch.dtype) -> int:
        """Of a weight that is read as `dtype`, scales of bytes left aside."""
        if self.quantization == "int4":
            return INT4_BITS_PER_GROUP // INT4_GROUP
        return 8 if self.quantization == "int8" else 8 * dtype.itemsize

    def has_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this project's kernels multiply by weights there."""
        return self.kernels and device.type == "cpu" and dtype in PACKED_DTYPES

    def keeps_twice(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a matrix there is kept in two ways: for a few rows and for many."""
        if not self.has_kernels(device, dtype):
            return False
        if self.quantization != "none":
            return self.quantization == "int8" and not cpu.has_amx()
        return dtype != torch.float32 and _has_onednn(device)


AS_STORED = WeightFormat()


def linear(weight: Tensor, bias: Tensor | None = None, weight_format: WeightFormat = AS_STORED) -> Linear:
    """x → x · weightᵀ + bias, with weight `[outputs, inputs]` and bias `[outputs]`.

    Keeps its own copy of the weight where that is faster. Gradients go through to x, not to the weight; compiled and
    quantized layers have none.
    """
    if not weight_format.has_kernels(weight.device, weight.dtype):
        return _once(weight, bias, weight_format.quantization)
    # Only who needs it pays for loading the compiler.
    from stitch_server.model.compiled_linear import CompiledLinear

    compiled = CompiledLinear.of(weight, bias, weight_format)
    if not weight_format.keeps_twice(weight.device, weight.dtype):
        return compiled
    return TwoLayoutLinear(_once(weight, bias, weight_format.quantization), compiled)


def _once(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Linear:
    if quantization == "int8":
        return _int8_linear(weight, bias)
    if quantization == "int4":
        return PlainInt4Linear(to_int4(weight), bias)
    if not _has_onednn(weight.device) or weight.dtype not in PACKED_DTYPES:
        return PlainLinear(weight, bias)
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS), bias)


def _has_onednn(device: torch.device) -> bool:
    """Whether matrices there are kept in its layout."""
    return torch.backends.mkldnn.is_available() and device.type == "cpu"  # type: ignore[no-untyped-call]


def _int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    # Older processors add pairs of products in 16 bits, which may be too few.
    exact = _has_onednn(weight.device) and torch.cpu._is_vnni_supported()
    return (PackedInt8Linear if exact else PlainInt8Linear).quantized(weight, bias)


def packed_rows(weight: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """A weight as kernels read it, and a scale for each output where it has one."""
    if weight_format.quantization == "int4":
        return to_int4(weight), None
    return to_int8(weight) if weight_format.quantization == "int8" else (weight, None)


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """The weight as PyTorch keeps it."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weight as oneDNN keeps it; the operators are those that `torch.compile` uses."""

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
class TwoLayoutLinear:
    """The weight in the layout of oneDNN for many rows, and in panels for a few."""

    many: Linear
    few: CompiledLinear

    def __call__(self, x: Tensor) -> Tensor:
        return self.few(x) if self.few.suits(x) else self.many(x)


class _Differentiable(torch.autograd.Function):
    """A packed layer with its derivative, which oneDNN's operators lack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed_linear: PackedLinear) -> Tensor:
        ctx.packed = packed_linear.packed
        return packed_linear.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.packed.to_dense(), None
