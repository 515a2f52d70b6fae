"""Affine maps in closed form, from sums alone. Knows neither models nor tokens.

With centred sums S = E (x-x̄)(x-x̄)ᵀ and C = E (y-ȳ)(x-x̄)ᵀ, ridge regression is

    W = C (S + r Δ²)⁻¹,   b = ȳ - W x̄,   Δ² = diag(S)

so that every channel is damped by the same share of its own variance: channels of a language model differ in size by a
factor of a thousand. What a map explains of output c of held-out tokens follows from their sums too:

    E (y-ȳ)² - E (W x + b - y)² = 2 (W Bᵀ)cc - (W A Wᵀ)cc

where A, B are the held-out E (x-x̄)(x-x̄)ᵀ and E (y-ȳ)(x-x̄)ᵀ about the training means. The strength r that is taken
explains most on the mean of all outputs, each in units of the variance that the weakest ridge gives it.
One eigendecomposition of the correlations Δ⁻¹ S Δ⁻¹ serves every r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stitch_training.moments import Cross, Gram

RIDGES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class AffineMap:
    """y = weight x + bias, with weight `[outputs, inputs]` and bias `[outputs]`, float64."""

    weight: Tensor
    bias: Tensor
    # [outputs]: what every sequence's first token becomes in place of that; None: it is mapped as the others are.
    first: Tensor | None = None


@dataclass(frozen=True)
class RidgeFit:
    """The map that explains most of the held-out targets, and how it was chosen."""

    map: AffineMap
    ridge: float
    # What it explains of held-out outputs, for every strength that was tried; one where all is.
    explained: dict[float, float]


class Spread:
    """How states of the bottom model lie around their mean: x̄, Δ and the eigendecomposition of their correlations."""

    def __init__(self, gram: Gram) -> None:
        self.mean = gram.total / gram.count
        covariance = gram.products / gram.count - torch.outer(self.mean, self.mean)
        # Rounding may leave a tiny negative value where nothing varies.
        deviations = covariance.diagonal().clamp(min=0.0).sqrt()
        inverse = torch.where(deviations > 0, 1 / deviations, torch.zeros_like(deviations))
        values, vectors = torch.linalg.eigh(inverse[:, None] * covariance * inverse)
        self.values = values.clamp(min=0.0)
        # (x - x̄) vectors has uncorrelated channels with variances `values`; their inverse takes these back.
        self.vectors = inverse[:, None] * vectors
        self._inverse = deviations[:, None] * vectors

    def damped(self, ridge: float) -> Tensor:
        """Eigenvalues of the correlations and the ridge `[inputs]`; infinite where nothing varies at all."""
        values = self.values + ridge
        return torch.where(values > 0, values, torch.full_like(values, torch.inf))

    def variances(self, weight: Tensor) -> Tensor:
        """Of every output of `weight` `[outputs, inputs]`."""
        found: Tensor = (weight @ self._inverse).square() @ self.values
        return found

    def whitening(self, ridge: float) -> Tensor:
        """P `[inputs, inputs]` such that P (x - x̄) has about unit variance in every direction."""
        whitening: Tensor = self.vectors.T / self.damped(ridge).sqrt()[:, None]
        return whitening


def fit_ridge(spread: Spread, training: Cross, gram: Gram, held_gram: Gram, held: Cross) -> RidgeFit:
    """The ridge regression of `training` whose strength explains most on the held-out sums.

    `spread` is that of `gram`, which belongs to `training` as `held_gram` does to `held`.
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
        """The mean over outputs for a weight in these coordinates, in `units` `[outputs]`; none where one is zero."""
        gained = (2 * weight * self.products - (weight @ self.inputs) * weight).sum(1)
        return float(torch.where(units > 0, gained / units, torch.zeros_like(units)).mean())


def holding(fitted: AffineMap, spread: Spread, state: Tensor, target: Tensor, ridge: float) -> AffineMap:
    """`fitted`, changed as little as possible so that it takes `state` `[inputs]` to `target` `[outputs]`.

    The least E |ΔW (x-x̄)|² with ΔW d = e, where d = state - x̄ and e = target - (W state + b), is the rank-one
    ΔW = e dᵀ S⁻¹ / (dᵀ S⁻¹ d); the mean of the outputs stays where it is. A model's first token, whose state is
    huge and nearly constant, is thus mapped well at hardly any cost to the others.
    """
    offset = state - spread.mean
    whitening = spread.whitening(ridge)
    solved = whitening.T @ (whitening @ offset)
    error = target - (fitted.weight @ state + fitted.bias)
    change = torch.outer(error, solved) / (offset @ solved)
    return AffineMap(fitted.weight + change, fitted.bias - change @ spread.mean)
