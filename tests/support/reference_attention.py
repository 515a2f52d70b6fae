"""Attention over one sequence by the textbook formula, without KV blocks or kernels."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceAttention:
    """Keeps one sequence's keys and values by layer; every pass appends to them."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Implements `stitch_server.attention.Attend`."""
        keys = self.keys[layer] = _appended(self.keys, layer, key)
        values = self.values[layer] = _appended(self.values, layer, value)
        group = query.shape[1] // key.shape[1]
        repeated_keys, repeated_values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, repeated_keys) * scale
        scores = scores.masked_fill(~_visible(len(query), len(keys), window), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated_values).flatten(1)


def _appended(cached: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
    return torch.cat([cached[layer], new]) if layer in cached else new.clone()


def _visible(new: int, length: int, window: int | None) -> Tensor:
    """bool `[new, length]`: the positions that each of the last `new` ones attends to."""
    positions = torch.arange(length)
    ages = positions[length - new :, None] - positions
    return (ages >= 0) & (ages < (window or length))
