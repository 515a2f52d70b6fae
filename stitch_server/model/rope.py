"""RoPE's inverse frequencies, with the scaling that a model's configuration asks for.

RoPE turns pair i of a head by position · θ^(-2i / head_dim): https://arxiv.org/abs/2104.09864. Each function takes and
returns inverse frequencies, float32 `[head_dim / 2]`; their bits are those of `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stitch_server.model.llama_config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """Returns the frequencies of the pairs, and the factor of all rotated values, which is 1 but for YaRN.

    Raises an error of arithmetic, or ValueError, for parameters that are no scaling.
    """
    rope = config.rope_parameters
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor rotates a part of a head")
    frequencies = 1.0 / _wavelengths(theta, config.head_dim)
    if kind == "linear":
        return frequencies / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if kind == "yarn":
        return _yarn(config)
    return frequencies, 1.0


def _wavelengths(theta: float, head_dim: int) -> Tensor:
    """Returns θ^(2i / head_dim), the wavelength of each pair divided by 2π."""
    wavelengths: Tensor = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return wavelengths


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones, and interpolates between the two.

    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    share = (length / wavelengths - low) / (high - low)
    between = (1 - share) * scaled / factor + share * scaled
    is_between = ~((wavelengths < length / high) | (wavelengths > length / low))
    return torch.where(is_between, between, scaled)


def _yarn(config: LlamaConfig) -> tuple[Tensor, float]:
    """Divides low frequencies by the factor along a ramp, and returns the factor of the values: arXiv 2309.00071."""
    rope, wavelengths = config.rope_parameters, _wavelengths(config.rope_parameters["rope_theta"], config.head_dim)
    length = rope["original_max_position_embeddings"]
    factor = config.max_position_embeddings / length if rope["factor"] is None else rope["factor"]
    kept = 1 - _ramp(*_yarn_range(rope, length, config.head_dim), config.head_dim // 2)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_radius(rope, factor)


def _yarn_range(rope: Mapping[str, Any], length: int, head_dim: int) -> tuple[float, float]:
    """Returns the pairs that turn `beta_fast` and `beta_slow` times within the original length."""

    def pair(turns: float) -> float:
        return (head_dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _ramp(low: float, high: float, pairs: int) -> Tensor:
    """Returns a line through 0 at pair `low` and 1 at pair `high`, clamped to between the two."""
    if low == high:
        high += 0.001
    return torch.clamp((torch.arange(pairs, dtype=torch.float32) - low) / (high - low), 0, 1)


def _yarn_radius(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1)
