"""Sums over tokens from which affine maps are solved, so that no activation is kept. Knows no model.

A `Gram` belongs to one depth of the bottom model, a `Cross` to a pair of depths; a sweep over many depths shares the
Grams. All sums are float64. The first token of a sequence is an outlier in size and is counted apart (`FirstStates`).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """Of states x `[tokens, inputs]`: their number, sum and the sum of x xᵀ."""

    def __init__(self, inputs: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """Counts `states` `[tokens, inputs]` in."""
        states = states.double()
        self.count += len(states)
        self.total += states.sum(0)
        self.products.addmm_(states.T, states)

    def state(self) -> dict[str, Tensor]:
        """The sums by name, to be saved and filled in again."""
        return {"count": self.count, "total": self.total, "products": self.products}


class Cross:
    """Of states x `[tokens, inputs]` and targets y `[tokens, outputs]`: Σ y, Σ y xᵀ and Σ |y|²."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.total = torch.zeros(outputs, dtype=torch.float64)
        self.products = torch.zeros(outputs, inputs, dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, states: Tensor, targets: Tensor) -> None:
        """Counts `states` `[tokens, inputs]` with their `targets` `[tokens, outputs]` in."""
        targets = targets.double()
        self.total += targets.sum(0)
        self.products.addmm_(targets.T, states.double())
        self.squares += targets.square().sum()

    def state(self) -> dict[str, Tensor]:
        """The sums by name, to be saved and filled in again."""
        return {"total": self.total, "products": self.products, "squares": self.squares}


class FirstStates:
    """The sum and number of the states of sequences' first tokens at one depth of one model."""

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """Counts `states` `[sequences, width]` in."""
        self.count += len(states)
        self.total += states.double().sum(0)

    def mean(self) -> Tensor:
        """`[width]`, float64."""
        return self.total / self.count

    def state(self) -> dict[str, Tensor]:
        """The sums by name, to be saved and filled in again."""
        return {"count": self.count, "total": self.total}
