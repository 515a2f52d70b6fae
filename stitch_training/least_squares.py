"""Affine maps in closed form, from sums over tokens.

A pass adds states of both models to the sums of every cut point, in float64, so no activation is kept and memory does
not grow with the number of tokens. A sequence's first token is an outlier in size and is summed apart.

With centred sums S = E (x-x̄)(x-x̄)ᵀ and C = E (y-ȳ)(x-x̄)ᵀ, ridge regression is

    W = C (S + r Δ²)⁻¹,   b = ȳ - W x̄,   Δ² = diag(S)

so every channel is damped by the same share of its own variance: channels of a language model differ in size by a
factor of a thousand. What a map explains of output c of held-out tokens follows from their sums as well:

    E (y-ȳ)² - E (W x + b - y)² = 2 (W Bᵀ)cc - (W A Wᵀ)cc

where A, B are the held-out E (x-x̄)(x-x̄)ᵀ and E (y-ȳ)(x-x̄)ᵀ about the training means. The chosen r explains most on
the mean of all outputs, each in units of the variance that the weakest ridge gives it. One eigendecomposition of the
correlations Δ⁻¹ S Δ⁻¹ serves every r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stitch_training.device import CPU

RIDGES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class CutPoint(NamedTuple):
    """Where a route changes models: it leaves the bottom after `k` layers and enters the top before layer `j`."""

    k: int
    j: int


class Gram:
    """Sums over states x `[tokens, inputs]` at one depth of the bottom model: their count, Σ x and Σ x xᵀ."""

    def __init__(self, inputs: int, device: torch.device = CPU) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)

    def add(self, states: Tensor) -> None:
        """Adds `states` `[tokens, inputs]`."""
        states = states.double()
        self.count += len(states)
        self.total += states.sum(0)
        self.products.addmm_(states.T, states)

    def state(self) -> dict[str, Tensor]:
        """Returns the sums by name; the tensors are the live ones."""
        return {"count": self.count, "total": self.total, "products": self.products}


class Cross:
    """Sums over states x `[tokens, inputs]` and targets y `[tokens, outputs]` of one cut: Σ y, Σ y xᵀ and Σ |y|²."""

    def __init__(self, inputs: int, outputs: int, device: torch.device = CPU) -> None:
        self.total = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, states: Tensor, targets: Tensor) -> None:
        """Adds `states` `[tokens, inputs]` with their `targets` `[tokens, outputs]`."""
        targets = targets.double()
        self.total += targets.sum(0)
        self.products.addmm_(targets.T, states.double())
        self.squares += targets.square().sum()

    def state(self) -> dict[str, Tensor]:
        """Returns the sums by name; the tensors are the live ones."""
        return {"total": self.total, "products": self.products, "squares": self.squares}


class FirstStates:
    """The count and sum of the states of sequences' first tokens at one depth of one model."""

    def __init__(self, width: int, device: torch.device = CPU) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, states: Tensor) -> None:
        """Adds `states` `[sequences, width]`."""
        self.count += len(states)
        self.total += states.double().sum(0)

    def mean(self) -> Tensor:
        """Returns the mean state `[width]`, float64."""
        return self.total / self.count

    def state(self) -> dict[str, Tensor]:
        """Returns the sums by name; the tensors are the live ones."""
        return {"count": self.count, "total": self.total}


class Sums:
    """All sums of one pass: a Gram per bottom depth, a Cross per cut, first-token states per depth of either model.

    They are on the device of the states that are added.
    """

    def __init__(self, cuts: Iterable[CutPoint], bottom_width: int, top_width: int, device: torch.device = CPU) -> None:
        self.cuts = tuple(cuts)
        self.bottom_depths = tuple(sorted({k for k, _ in self.cuts}))
        self.top_depths = tuple(sorted({j for _, j in self.cuts}))
        self.grams = {k: Gram(bottom_width, device) for k in self.bottom_depths}
        self.crosses = {cut: Cross(bottom_width, top_width, device) for cut in self.cuts}
        self.first_bottom = {k: FirstStates(bottom_width, device) for k in self.bottom_depths}
        self.first_top = {j: FirstStates(top_width, device) for j in self.top_depths}

    def add(self, bottom: Mapping[int, Tensor], top: Mapping[int, Tensor]) -> None:
        """Adds sequences: for every depth of each model their states `[sequences, tokens, width]`."""
        for k in self.bottom_depths:
            self.first_bottom[k].add(bottom[k][:, 0])
            self.grams[k].add(bottom[k][:, 1:].flatten(0, 1))
        for j in self.top_depths:
            self.first_top[j].add(top[j][:, 0])
        for (k, j), cross in self.crosses.items():
            cross.add(bottom[k][:, 1:].flatten(0, 1), top[j][:, 1:].flatten(0, 1))

    def state(self) -> dict[str, Tensor]:
        """Returns every sum under its own name; the tensors are the live ones."""
        groups: dict[str, Gram | Cross | FirstStates] = {f"gram.{k}": gram for k, gram in self.grams.items()}
        groups |= {f"cross.{k}.{j}": cross for (k, j), cross in self.crosses.items()}
        groups |= {f"first_bottom.{k}": first for k, first in self.first_bottom.items()}
        groups |= {f"first_top.{j}": first for j, first in self.first_top.items()}
        return {f"{group}.{name}": value for group, sums in groups.items() for name, value in sums.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copies in what `state()` returned. Raises KeyError where it is of other cuts."""
        for name, value in self.state().items():
            value.copy_(state[name])


@dataclass(frozen=True)
class AffineMap:
    """y = weight x + bias, with weight `[outputs, inputs]` and bias `[outputs]`, float64."""

    weight: Tensor
    bias: Tensor
    # [outputs]: the image of every sequence's first token; None: it is mapped as the others are.
    first: Tensor | None = None


def identity_map(width: int, device: torch.device = CPU) -> AffineMap:
    """Returns the map that leaves states of `width` values as they are."""
    exact = torch.float64
    return AffineMap(torch.eye(width, dtype=exact, device=device), torch.zeros(width, dtype=exact, device=device))


def is_identity(fitted: AffineMap) -> bool:
    """Whether a map leaves states as they are."""
    outputs, inputs = fitted.weight.shape
    is_square = outputs == inputs and fitted.first is None and not fitted.bias.any()
    return is_square and torch.equal(fitted.weight, identity_map(outputs, fitted.weight.device).weight)


@dataclass(frozen=True)
class RidgeFit:
    """The ridge regression that explains most of the held-out targets, and how its strength was chosen."""

    map: AffineMap
    ridge: float
    # Explained share of the held-out outputs by ridge strength; 1 where all is explained.
    explained: dict[float, float]


class Spread:
    """The distribution of the bottom model's states: x̄, Δ and the eigendecomposition of their correlations."""

    def __init__(self, gram: Gram) -> None:
        self.mean = gram.total / gram.count
        covariance = gram.products / gram.count - torch.outer(self.mean, self.mean)
        # Rounding may leave a tiny negative value where nothing varies.
        deviations = covariance.diagonal().clamp(min=0.0).sqrt()
        inverse = torch.where(deviations > 0, 1 / deviations, torch.zeros_like(deviations))
        values, vectors = torch.linalg.eigh(inverse[:, None] * covariance * inverse)
        self.values = values.clamp(min=0.0)
        # (x - x̄) `vectors` has uncorrelated channels with variances `values`; `_inverse` is the inverse transform.
        self.vectors = inverse[:, None] * vectors
        self._inverse = deviations[:, None] * vectors

    def damped(self, ridge: float) -> Tensor:
        """Returns eigenvalues plus ridge `[inputs]`; infinite where nothing varies."""
        values = self.values + ridge
        return torch.where(values > 0, values, torch.full_like(values, torch.inf))

    def variances(self, weight: Tensor) -> Tensor:
        """Returns the variance of every output of `weight` `[outputs, inputs]`."""
        found: Tensor = (weight @ self._inverse).square() @ self.values
        return found

    def whitening(self, ridge: float) -> Tensor:
        """Returns P `[inputs, inputs]` such that P (x - x̄) has about unit variance in every direction."""
        whitening: Tensor = self.vectors.T / self.damped(ridge).sqrt()[:, None]
        return whitening


def fit_ridge(spread: Spread, training: Cross, gram: Gram, held_gram: Gram, held: Cross) -> RidgeFit:
    """Fits `training` by the ridge strength that explains most of the held-out sums.

    `spread` is the distribution of `gram`, which belongs to `training` as `held_gram` does to `held`.
    """
    target_mean = training.total / gram.count
    covariance = training.products / gram.count - torch.outer(target_mean, spread.mean)
    rotated = covariance @ spread.vectors
    held_out = _HeldOut(spread, target_mean, held_gram, held)
    units = (rotated / spread.damped(RIDGES[0])).square() @ spread.values
    explained = {ridge: held_out.explained(rotated / spread.damped(ridge), units) for ridge in RIDGES}
    best = max(explained, key=explained.__getitem__)
    weight = rotated / spread.damped(best) @ spread.vectors.T
    return RidgeFit(AffineMap(weight, target_mean - weight @ spread.mean), best, explained)


class _HeldOut:
    """A and B of the module's formula, in the eigenvectors' coordinates."""

    def __init__(self, spread: Spread, target_mean: Tensor, gram: Gram, cross: Cross) -> None:
        count, mean, vectors = gram.count, spread.mean, spread.vectors
        about = gram.total / count - mean
        inputs = gram.products / count - torch.outer(mean, mean) - torch.outer(about, mean) - torch.outer(mean, about)
        shift = cross.total / count - target_mean
        products = cross.products / count - torch.outer(target_mean, mean)
        products -= torch.outer(shift, mean) + torch.outer(target_mean, about)
        self.inputs = vectors.T @ inputs @ vectors
        self.products = products @ vectors

    def explained(self, weight: Tensor, units: Tensor) -> float:
        """Returns the mean over outputs, in `units` `[outputs]`, for a weight in these coordinates; 0 at zero units."""
        gained = (2 * weight * self.products - (weight @ self.inputs) * weight).sum(1)
        return float(torch.where(units > 0, gained / units, torch.zeros_like(units)).mean())


def hold_state(fitted: AffineMap, spread: Spread, state: Tensor, target: Tensor, ridge: float) -> AffineMap:
    """Changes `fitted` as little as possible so that it maps `state` `[inputs]` to `target` `[outputs]`.

    The least E |ΔW (x-x̄)|² with ΔW d = e, where d = state - x̄ and e = target - (W state + b), is the rank-one
    ΔW = e dᵀ S⁻¹ / (dᵀ S⁻¹ d); the mean of the outputs does not change. A model's first token, whose state is huge
    and nearly constant, is thus mapped well at hardly any cost to the other tokens.
    """
    offset = state - spread.mean
    whitening = spread.whitening(ridge)
    solved = whitening.T @ (whitening @ offset)
    error = target - (fitted.weight @ state + fitted.bias)
    change = torch.outer(error, solved) / (offset @ solved)
    return AffineMap(fitted.weight + change, fitted.bias - change @ spread.mean)


class ClosedForm:
    """Stitches solved from the sums of a training and a held-out pass over the same cuts."""

    def __init__(self, training: Sums, held: Sums) -> None:
        self._training, self._held = training, held
        self._spreads: dict[int, Spread] = {}

    def spread(self, k: int) -> Spread:
        """Returns the distribution of the states at depth `k`, decomposed once."""
        if k not in self._spreads:
            self._spreads[k] = Spread(self._training.grams[k])
        return self._spreads[k]

    def ridge_fit(self, cut: CutPoint) -> RidgeFit:
        """Returns the best ridge regression for `cut`, which ignores first tokens."""
        sums, held, k = self._training, self._held, cut[0]
        return fit_ridge(self.spread(k), sums.crosses[cut], sums.grams[k], held.grams[k], held.crosses[cut])

    def first_state(self, k: int) -> Tensor:
        """Returns the bottom model's mean state of first tokens at depth `k`."""
        return self._training.first_bottom[k].mean()

    def first_target(self, j: int) -> Tensor:
        """Returns the top model's mean state of first tokens at depth `j`."""
        return self._training.first_top[j].mean()

    def mean_square(self, k: int, weight: Tensor, bias: Tensor) -> float:
        """Returns E |W x + b|² over the states x at depth `k`."""
        spread = self.spread(k)
        return float(spread.variances(weight).sum() + (weight @ spread.mean + bias).square().sum())

    def hold_first(self, k: int, fitted: AffineMap, target: Tensor, ridge: float) -> AffineMap:
        """Changes `fitted` so that it maps the mean state of first tokens at depth `k` to `target`."""
        return hold_state(fitted, self.spread(k), self.first_state(k), target, ridge)
