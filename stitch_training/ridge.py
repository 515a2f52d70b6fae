"""Linear regression with a penalty that the data choose. Knows neither prompts nor hidden states.

weights = (XᵀX + λ)⁻¹ Xᵀy on standardized features. λ is the one of a grid whose leave-one-out error is least; that
error needs no second fit: row i's is its residual ÷ (1 − hᵢ), h the diagonal of the hat matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stitch_training.recovery import Numbers

# As multiples of the rows: λ ÷ rows is what a standardized feature's variance of 1 is weighed against.
PENALTIES = tuple(10.0**exponent for exponent in np.arange(-3, 2.01, 0.25))


@dataclass(frozen=True)
class Ridge:
    """predictions [rows, targets] = features [rows, features] · weights + bias."""

    weights: Numbers
    bias: Numbers
    # λ ÷ rows.
    penalty: float

    def predict(self, features: Numbers) -> Numbers:
        predicted: Numbers = features @ self.weights + self.bias
        return predicted


def fit(features: Numbers, targets: Numbers) -> Ridge:
    """For features [rows, features] and targets [rows, targets]; a feature that never varies gets no weight."""
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    standard, centre = (features - mean) * scale, targets.mean(axis=0)
    variances, axes = np.linalg.eigh(standard.T @ standard)
    variances = np.maximum(variances, 0.0)
    turned = standard @ axes
    projected = turned.T @ (targets - centre)
    penalty = min(PENALTIES, key=lambda one: _error(turned, variances, projected, targets - centre, one))
    solved = axes @ (projected / (variances + penalty * len(features))[:, None])
    weights = solved * scale[:, None]
    return Ridge(weights, centre - mean @ weights, penalty)


def _error(turned: Numbers, variances: Numbers, projected: Numbers, wanted: Numbers, penalty: float) -> float:
    """The mean squared leave-one-out error."""
    shrunk = 1 / (variances + penalty * len(turned))
    residuals = wanted - turned @ (projected * shrunk[:, None])
    # The mean of all rows is fitted as well: 1 / rows of every row's own leverage.
    leverage = (turned**2) @ shrunk + 1 / len(turned)
    return float(((residuals / (1 - leverage)[:, None]) ** 2).mean())
