"""Attention over one sequence's context, written out as the formula says, without blocks or kernels."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainAttend:
    """One sequence's keys and values, layer by layer; every pass extends them."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `stitch_server.attention.Attend` says."""
        keys = self.keys[layer] = _appended(self.keys, layer, key)
        values = self.values[layer] = _appended(self.values, layer, value)
        group = query.shape[1] // key.shape[1]
        repeated_keys, repeated_values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, repeated_keys) * scale
        scores = scores.masked_fill(~_visible(len(query), len(keys), window), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated_values).flatten(1)


def _appended(past: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
    return torch.cat([past[layer], new]) if layer in past else new.clone()


def _visible(new: int, length: int, window: int | None) -> Tensor:
    """bool `[new, length]`: what each of the last `new` positions may look at."""
    positions = torch.arange(length)
    ages = positions[length - new :, None] - positions
    return (ages >= 0) & (ages < (window or length))
