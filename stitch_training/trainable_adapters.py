"""Adapters that are being trained, in coordinates where every step means the same. Knows no loss.

With the states' channels of unequal size, entries of A and B are trained as shares of what goes in and comes out:

    A = U / σ_in,    B = σ_out V

σ_in are the root mean squares of what A reads, σ_out those of the layer's states, channel by channel, on one batch
through the frozen top. U is drawn from the seed, V begins at zero, and so the adapters begin with no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.model.adapters import EPSILON, Adapters
from stitch_training.frozen_models import FrozenModel


@dataclass(frozen=True)
class Sizes:
    """Root mean squares of every layer's channels, `[layers, hidden]`: of what an adapter reads, and of the states."""

    reading: Tensor
    states: Tensor


def sizes_of(top: FrozenModel, hidden: Tensor, first: int) -> Sizes:
    """Of the layers from `first` on, with states `[sequences, tokens, hidden]` before that one.

    The first token, whose few huge values would set the measure, is left out.
    """
    reading, states = [], []
    with torch.no_grad():
        for layer in range(first, top.depth):
            rows = hidden[:, 1:].flatten(0, 1).float()
            states.append(_root_mean_square(rows))
            reading.append(_root_mean_square(F.rms_norm(rows, rows.shape[1:], None, EPSILON)))
            hidden = top.run(hidden, layer, layer + 1)
    return Sizes(torch.stack(reading), torch.stack(states))


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(0).sqrt().clamp_min(EPSILON)


class TrainableAdapters:
    """U `[layers, rank, hidden]` and V `[layers, hidden, rank]` above, and the adapters that they make."""

    def __init__(self, sizes: Sizes, adapters: Adapters) -> None:
        self._first, self._sizes = adapters.first, sizes
        self._down = (adapters.down.float() * sizes.reading[:, None, :]).requires_grad_()
        self._up = (adapters.up.float() / sizes.states[:, :, None]).requires_grad_()

    @classmethod
    def fresh(cls, first: int, rank: int, sizes: Sizes, seed: int) -> TrainableAdapters:
        """Without effect, for the layers from `first` on."""
        layers, hidden = sizes.reading.shape
        draw = torch.Generator().manual_seed(seed)
        drawn = torch.randn(layers, rank, hidden, generator=draw) * hidden**-0.5
        return cls(sizes, Adapters(first, drawn / sizes.reading[:, None, :], torch.zeros(layers, hidden, rank)))

    def parameters(self) -> Sequence[Tensor]:
        """What training changes."""
        return [self._down, self._up]

    def to_adapters(self) -> Adapters:
        """The adapters so far; gradients go through."""
        down, up = self._down / self._sizes.reading[:, None, :], self._up * self._sizes.states[:, :, None]
        return Adapters(self._first, down, up)
