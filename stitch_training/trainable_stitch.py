"""A stitch that is being trained, in coordinates where every step means the same. Knows no loss.

    y = W₀ x + b₀ + D (V P (x - x̄) + c)

W₀, b₀ are the least-squares map. P whitens the bottom's states, D holds the standard deviations of the top's, so that
entries of V and c are shares of what varies, and one learning rate suits all of them, however unequal the channels
of a language model are. The first token's state is held at the top's mean of first tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stitch_server.model.adapters import Adapters
from stitch_training.least_squares import AffineMap
from stitch_training.trainable_adapters import TrainableAdapters


@dataclass(frozen=True)
class Coordinates:
    """Where training starts and how it measures: everything that does not change, float32."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    whitening: Tensor
    # Standard deviations of the targets [outputs].
    deviations: Tensor
    # The top model's mean state of first tokens [outputs].
    first: Tensor


class TrainableStitch:
    """V `[outputs, inputs]` and c `[outputs]` above and the map that they make; adapters of the top where given."""

    def __init__(self, coordinates: Coordinates, adapters: TrainableAdapters | None = None) -> None:
        self._at = coordinates
        self._adapters = adapters
        self.change = torch.zeros_like(coordinates.weight).requires_grad_()
        self.shift = torch.zeros_like(coordinates.bias).requires_grad_()

    def __call__(self, states: Tensor) -> Tensor:
        """The bottom's states `[sequences, tokens, inputs]` to the top's, `[sequences, tokens, outputs]`."""
        at = self._at
        weight = at.weight + at.deviations[:, None] * (self.change @ at.whitening)
        centre = at.weight @ at.mean + at.bias + at.deviations * self.shift
        mapped = torch.nn.functional.linear(states[:, 1:] - at.mean, weight, centre)
        first = at.first.expand(len(states), 1, -1)
        return torch.cat([first, mapped], dim=1)

    def parameters(self) -> Sequence[Tensor]:
        """What training changes."""
        return [self.change, self.shift, *(() if self._adapters is None else self._adapters.parameters())]

    def adapters(self) -> Adapters | None:
        """The adapters so far, if it has any; gradients go through."""
        return None if self._adapters is None else self._adapters.to_adapters()

    def trained_adapters(self) -> Adapters | None:
        """The same without gradients."""
        with torch.no_grad():
            return self.adapters()

    def to_map(self) -> AffineMap:
        """The map so far, without the hold on the first token."""
        at = self._at
        weight = at.weight.double() + at.deviations.double()[:, None] * (self.change.double() @ at.whitening.double())
        centre = at.weight.double() @ at.mean.double() + at.bias.double() + at.deviations * self.shift
        return AffineMap(weight.detach(), (centre - weight @ at.mean.double()).detach())
