"""From the gains of N routes to one of them, and to the words that say why. Knows neither text nor hidden states.

A threshold is what a route's gain must at least be worth. Of several routes that are, the one that exceeds its
threshold by most is taken; with thresholds proportional to the routes' costs that is the best trade of quality for
cost at one price, whatever the number of routes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch.thresholds import Thresholds


def chosen(gains: NDArray[np.floating[Any]], thresholds: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """[texts]: the index of the route for gains [texts, routes], first column 0, and thresholds [routes - 1]."""
    worth = gains - np.concatenate([[0.0], thresholds])
    # Of equals the first, so the cheapest.
    best: NDArray[np.int64] = np.argmax(worth, axis=1)
    return best


def score(gain: float, calibration: Thresholds | None, trained: Sequence[float]) -> float:
    """The share of texts whose gain of the strongest route is below `gain`, 0 to 1.

    They are those of the calibration, where that knows their percentiles, else of the training.
    """
    calibrated = None if calibration is None else calibration.gain_percentiles
    percentiles = calibrated or trained
    return bisect_left(percentiles, gain) / len(percentiles)


def reason(what: str, gains: Sequence[float], thresholds: Sequence[float], rung: int) -> str:
    """The comparison that decided: with the threshold of the route, or of the one that came nearest to its own.

    `gains` [routes] with 0 for the cheapest, `thresholds` [routes - 1]; `what` names whose gain it is.
    """
    if not thresholds:
        return "the only route"
    if rung:
        return f"{what} {gains[rung]:.2f} > {thresholds[rung - 1]:.2f}"
    nearest = max(range(len(thresholds)), key=lambda index: gains[index + 1] - thresholds[index])
    return f"{what} {gains[nearest + 1]:.2f} ≤ {thresholds[nearest]:.2f}"
