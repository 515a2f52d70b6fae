"""Affine maps in closed form, from sums alone. Knows neither models nor tokens.

With centred sums S = E (x-x̄)(x-x̄)ᵀ and C = E (y-ȳ)(x-x̄)ᵀ, ridge regression is

    W = C (S + r s I)⁻¹,   b = ȳ - W x̄,   s = trace(S) / inputs

and its error on held-out tokens follows from their sums too:

    E |W x + b - y|² = trace(W A Wᵀ) - 2 trace(W Bᵀ) + c

where A, B, c are the held-out E (x-x̄)(x-x̄)ᵀ, E (y-ȳ)(x-x̄)ᵀ and E |y-ȳ|² about the training means.
One eigendecomposition of S serves every strength r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stitch_server.fit.moments import Cross, Gram

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class AffineMap:
    """y = weight x + bias, with weight `[outputs, inputs]` and bias `[outputs]`, float64."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class RidgeFit:
    """The map with the smallest held-out error, and how it was chosen."""

    map: AffineMap
    ridge: float
    # Share of the targets' held-out variance that is left, for every strength that was tried.
    residuals: dict[float, float]


class Spread:
    """How states of the bottom model lie around their mean: x̄ and the eigendecomposition of S."""

    def __init__(self, gram: Gram) -> None:
        self.mean = gram.total / gram.count
        covariance = gram.products / gram.count - torch.outer(self.mean, self.mean)
        values, self.vectors = torch.linalg.eigh(covariance)
        # Rounding may leave a tiny negative one where S is singular.
        self.values = values.clamp(min=0.0)

    def damped(self, ridge: float) -> Tensor:
        """Eigenvalues of S + r s I `[inputs]`; infinite where nothing varies at all."""
        values = self.values + ridge * self.values.mean()
        return torch.where(values > 0, values, torch.full_like(values, torch.inf))

    def whitening(self, ridge: float) -> Tensor:
        """P `[inputs, inputs]` such that P (x - x̄) has about unit variance in every direction."""
        whitening: Tensor = self.vectors.T / self.damped(ridge).sqrt()[:, None]
        return whitening


def fit_ridge(spread: Spread, training: Cross, gram: Gram, held_gram: Gram, held: Cross) -> RidgeFit:
    """The ridge regression of `training` whose strength has the least error on the held-out sums.

    `spread` is that of `gram`, which belongs to `training` as `held_gram` does to `held`.
    """
    target_mean = training.total / gram.count
    covariance = training.products / gram.count - torch.outer(target_mean, spread.mean)
    rotated = covariance @ spread.vectors
    error = _HeldOutError(spread, target_mean, held_gram, held)
    residuals = {ridge: error.of(rotated / spread.damped(ridge)) for ridge in RIDGES}
    best = min(residuals, key=residuals.__getitem__)
    weight = rotated / spread.damped(best) @ spread.vectors.T
    return RidgeFit(AffineMap(weight, target_mean - weight @ spread.mean), best, residuals)


class _HeldOutError:
    """A, B and c of the module's formula, in the eigenvectors' coordinates."""

    def __init__(self, spread: Spread, target_mean: Tensor, gram: Gram, cross: Cross) -> None:
        count, mean, vectors = gram.count, spread.mean, spread.vectors
        about = gram.total / count - mean
        inputs = gram.products / count - torch.outer(mean, mean) - torch.outer(about, mean) - torch.outer(mean, about)
        shift = cross.total / count - target_mean
        products = cross.products / count - torch.outer(target_mean, mean)
        products -= torch.outer(shift, mean) + torch.outer(target_mean, about)
        self.inputs = vectors.T @ inputs @ vectors
        self.products = products @ vectors
        self.targets = cross.squares / count - target_mean @ target_mean - 2 * shift @ target_mean

    def of(self, weight: Tensor) -> float:
        """E |W x + b - y|² over E |y - ȳ|² for a weight in these coordinates."""
        squares = ((weight @ self.inputs) * weight).sum() - 2 * (weight * self.products).sum() + self.targets
        return float(squares / self.targets)


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
