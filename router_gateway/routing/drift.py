"""Shares of routes and the drift of scores over the latest judgements. Knows no text and no metric.

A learned router's score is the share of its calibration's texts that ask less for the strongest route, so over texts
like those scores are spread evenly from 0 to 1. Drift is the largest distance between the share of the latest scores
up to a point and that point: the statistic of Kolmogorov and Smirnov, 0 to 1. Of texts that have not changed, one
window of 2,000 in a thousand exceeds .044.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from itertools import accumulate

WINDOW = 2_000
# Fewer say little: of texts that have not changed, one window of so many in a thousand exceeds .14.
LEAST = 200
_BINS = 100


class Latest:
    """The latest judgements, at most `window`."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        # Route and bin of the score.
        self._judged: deque[tuple[str, int]] = deque()
        self._routes: Counter[str] = Counter()
        self._bins = [0] * (_BINS + 1)

    def add(self, route: str, score: float) -> None:
        """The next judgement; the score is from 0 to 1."""
        # Bin b holds the scores above (b - 1) / _BINS, up to b / _BINS.
        entry = route, math.ceil(score * _BINS)
        self._judged.append(entry)
        self._count(entry, 1)
        if len(self._judged) > self._window:
            self._count(self._judged.popleft(), -1)

    def share(self, route: str) -> float:
        """Of the latest judgements; 0 before the first."""
        return self._routes[route] / max(len(self._judged), 1)

    def drift(self) -> float:
        """0 to 1; NaN before there are enough."""
        count = len(self._judged)
        if count < LEAST:
            return math.nan
        reached = accumulate(self._bins)
        return max(abs(sofar / count - edge / _BINS) for edge, sofar in enumerate(reached))

    def _count(self, entry: tuple[str, int], by: int) -> None:
        route, edge = entry
        self._routes[route] += by
        self._bins[edge] += by
