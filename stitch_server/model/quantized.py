"""int8 and int4 weights: their conversion, and linear layers by them without this project's kernels.

int8 has a scale for each output; oneDNN quantizes the tokens' inputs as well, so that its matmul is one of small
integers. int4 has a step and a least weight for each group of inputs (`stitch_server/cpu/matmul/int4_layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch.cluster import Quantization
from stitch_server.cpu import INT4_GROUP, INT4_MAX_STEPS, INT4_SHIFTS, INT4_WORD_INPUTS, INT4_WORDS
from stitch_server.model.weights import WeightFormat

# The number of tokens that oneDNN's layout is chosen for; layouts for 8, 64 and 512 measured alike.
TYPICAL_TOKENS = 8
# Signed bytes without their lowest value, so that both signs reach equally far.
MAX_INT8 = 127
# oneDNN's fast kernels take the inputs as unsigned bytes: 128 stands for zero.
ZERO_POINT = 128
# Added before the fraction is truncated, so that bytes are rounded.
ROUNDED_ZERO = torch.tensor(ZERO_POINT + 0.5)
# Keeps a token of zeros from being divided by zero.
MIN_SCALE = 1e-30


def quantize(weight: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """Converts a weight to what kernels read; int8 weights have a scale for each output."""
    if weight_format.quantization == "int4":
        return to_int4(weight), None
    return to_int8(weight) if weight_format.quantization == "int8" else (weight, None)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[outputs, inputs]` to int8 of that shape and float32 scales `[outputs]`: weight ≈ int8 · scale."""
    scales = (weight.float().abs().amax(dim=1) / MAX_INT8).clamp_min(MIN_SCALE)
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


def to_int4(weight: Tensor) -> Tensor:
    """`[outputs, inputs]` to uint32 `[outputs, groups * INT4_WORDS]`; the last group is padded with zeros."""
    outputs, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % INT4_GROUP)).view(outputs, -1, INT4_GROUP)
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    step, least = ((largest - least) / INT4_MAX_STEPS).half(), least.half()
    steps = torch.round((groups - least.float()) / step.float().clamp_min(MIN_SCALE)).clamp_(0, INT4_MAX_STEPS)
    words = _pack(steps.to(torch.int32).view(outputs, -1, INT4_WORDS - 1, INT4_WORD_INPUTS), INT4_SHIFTS)
    pairs = _pack(torch.stack([step, least], -1).view(torch.int16).to(torch.int32) & 0xFFFF, (0, 16))
    return torch.cat([words, pairs], -1).view(outputs, -1).view(torch.uint32)


def rounded(weight: Tensor, quantization: Quantization) -> Tensor:
    """Returns the weights `[outputs, inputs]` that the quantized ones stand for, in the dtype of `weight`."""
    if quantization == "int8":
        int8, scales = to_int8(weight)
        return (int8 * scales[:, None]).to(weight.dtype)
    if quantization == "int4":
        return from_int4(to_int4(weight))[:, : weight.shape[1]].to(weight.dtype)
    return weight


def _pack(numbers: Tensor, shifts: Sequence[int]) -> Tensor:
    """Packs the last dimension's numbers into one int32 each, every number at its shift."""
    return reduce(torch.bitwise_or, (number << shift for number, shift in zip(numbers.unbind(-1), shifts, strict=True)))


def from_int4(words: Tensor) -> Tensor:
    """The float32 weights `[outputs, inputs of whole groups]` of such words."""
    groups = words.view(torch.int32).view(len(words), -1, INT4_WORDS)
    step, least = groups[..., -1:].contiguous().view(torch.float16).float().unbind(-1)
    steps = groups[..., :-1].unsqueeze(-1) >> torch.tensor(INT4_SHIFTS, device=words.device) & INT4_MAX_STEPS
    # A product of four bits and eleven is exact, so this is rounded once.
    weight: Tensor = (steps.flatten(2) * step.unsqueeze(-1) + least.unsqueeze(-1)).flatten(1)
    return weight


@dataclass(frozen=True, slots=True)
class PlainInt4Linear:
    """A linear layer by int4 weights on any device: little memory, and no faster than float32."""

    words: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, from_int4(self.words)[:, : x.shape[1]].to(x.dtype), self.bias)


@dataclass(frozen=True, slots=True)
class PlainInt8Linear:
    """A linear layer by int8 weights on any device: a quarter of float32's memory, and no faster."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> PlainInt8Linear:
        return cls(*to_int8(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return result if self.bias is None else result.add_(self.bias)


@dataclass(frozen=True, slots=True)
class PackedInt8Linear:
    """A linear layer by int8 weights in oneDNN; the operators are those of `torch.compile`'s quantized models.

    A token's inputs become bytes as well, with one scale: value ≈ (byte - 128) · max |inputs| / 127.
    """

    packed: Tensor
    # The weights' scales divided by 127: a token's bytes stand for its inputs / max |inputs| * 127.
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> PackedInt8Linear:
        int8, scales = to_int8(weight)
        packed = torch.ops.onednn.qlinear_prepack(int8, [TYPICAL_TOKENS, weight.shape[1]])
        return cls(packed, scales / MAX_INT8, torch.zeros(len(scales), dtype=torch.int32), bias)

    def __call__(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32).add_(MIN_SCALE)
        inputs = torch.addcdiv(ROUNDED_ZERO, x, largest, value=MAX_INT8).to(torch.uint8)
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            inputs,
            1.0,
            ZERO_POINT,
            self.packed,
            self.scales,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        result = result.mul_(largest) if self.bias is None else torch.addcmul(self.bias, result, largest)
        return result.to(x.dtype)
