"""From the gains of N routes to one of them. Knows no text.

A threshold is what a route's gain must at least be worth. Of several routes that are, the one that exceeds its
threshold by most is taken; with thresholds proportional to the routes' costs that is the best trade of quality for
cost at one price, whatever the number of routes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def chosen(gains: NDArray[np.floating[Any]], thresholds: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """[texts]: the index of the route for gains [texts, routes], first column 0, and thresholds [routes - 1]."""
    worth = gains - np.concatenate([[0.0], thresholds])
    # Of equals the first, so the cheapest.
    best: NDArray[np.int64] = np.argmax(worth, axis=1)
    return best
