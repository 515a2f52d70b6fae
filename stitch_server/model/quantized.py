"""int8 and int4 weights, and linear layers by them without this project's kernels. Doesn't know whose layers.

int8 has a scale for each output; oneDNN quantizes rows as well, so that its product is one of small integers. int4 has
a step and a least weight for each group of inputs (`kernels/matmul/int4_layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.cpu import INT4_GROUP, INT4_MAX_STEPS, INT4_SHIFTS, INT4_WORD_INPUTS, INT4_WORDS

# The number of rows that oneDNN's layout is chosen for; layouts for 8, 64 and 512 measured alike.
TYPICAL_ROWS = 8
# Signed bytes without their lowest value, so that both signs reach equally far.
MOST_INT8 = 127
# oneDNN's fast kernels take the rows as unsigned bytes: 128 stands for zero.
ZERO_POINT = 128
# Added before bytes are cut off behind the point, so that they are rounded.
ROUNDED_ZERO = torch.tensor(ZERO_POINT + 0.5)
# Keeps a row of zeros from being divided by zero.
LEAST_SCALE = 1e-30


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[outputs, inputs]` to int8 of that shape and float32 scales `[outputs]`: weight ≈ int8 · scale."""
    scales = (weight.float().abs().amax(dim=1) / MOST_INT8).clamp_min(LEAST_SCALE)
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


def to_int4(weight: Tensor) -> Tensor:
    """`[outputs, inputs]` to words `[outputs, groups * WORDS]` of uint32, the last group filled up with zeros."""
    outputs, inputs = weight.shape
    groups = F.pad(weight.float(), (0, -inputs % INT4_GROUP)).view(outputs, -1, INT4_GROUP)
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    step, least = ((largest - least) / INT4_MAX_STEPS).half(), least.half()
    steps = torch.round((groups - least.float()) / step.float().clamp_min(LEAST_SCALE)).clamp_(0, INT4_MAX_STEPS)
    words = _joined(steps.to(torch.int32).view(outputs, -1, INT4_WORDS - 1, INT4_WORD_INPUTS), INT4_SHIFTS)
    pairs = _joined(torch.stack([step, least], -1).view(torch.int16).to(torch.int32) & 0xFFFF, (0, 16))
    return torch.cat([words, pairs], -1).view(outputs, -1).view(torch.uint32)


def _joined(numbers: Tensor, places: Sequence[int]) -> Tensor:
    """Neighbours in one word of int32, each at its place."""
    return reduce(torch.bitwise_or, (number << at for number, at in zip(numbers.unbind(-1), places, strict=True)))


def from_int4(words: Tensor) -> Tensor:
    """The float32 `[outputs, inputs of whole groups]` that such words stand for."""
    groups = words.view(torch.int32).view(len(words), -1, INT4_WORDS)
    step, least = groups[..., -1:].contiguous().view(torch.float16).float().unbind(-1)
    steps = groups[..., :-1].unsqueeze(-1) >> torch.tensor(INT4_SHIFTS, device=words.device) & INT4_MAX_STEPS
    # A product of four bits and eleven is exact, so this is rounded once.
    weight: Tensor = (steps.flatten(2) * step.unsqueeze(-1) + least.unsqueeze(-1)).flatten(1)
    return weight


@dataclass(frozen=True, slots=True)
class PlainInt4Linear:
    """The matrix in four bits on any device: little memory, and no speed."""

    words: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, from_int4(self.words)[:, : x.shape[1]].to(x.dtype), self.bias)


@dataclass(frozen=True, slots=True)
class PlainInt8Linear:
    """The matrix as bytes on any device: a quarter of float32's memory, and no faster."""

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
    """The matrix as bytes for oneDNN; the operators are those of `torch.compile`'s quantized models.

    Rows become bytes as well, one scale for each: value ≈ (byte - 128) · max |row| / 127.
    """

    packed: Tensor
    # Of the weights and of what rows are divided by: a row's bytes stand for its values / max |row| * 127.
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None) -> PackedInt8Linear:
        rows, scales = to_int8(weight)
        packed = torch.ops.onednn.qlinear_prepack(rows, [TYPICAL_ROWS, weight.shape[1]])
        return cls(packed, scales / MOST_INT8, torch.zeros(len(scales), dtype=torch.int32), bias)

    def __call__(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32).add_(LEAST_SCALE)
        rows = torch.addcdiv(ROUNDED_ZERO, x, largest, value=MOST_INT8).to(torch.uint8)
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows,
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
