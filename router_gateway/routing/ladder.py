"""From a score to one of N routes. Knows nothing of where a score comes from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from stitch.errors import InvalidRequest


class Ladder:
    """Routes as rungs, cheapest first, with one threshold between every two neighbours."""

    def __init__(self, thresholds: Sequence[float] | None = None) -> None:
        self._thresholds = thresholds

    def pick(self, score: float, routes: Sequence[str]) -> tuple[str, str]:
        """The route for a score in [0, 1], and the comparison that decided, in words."""
        thresholds = self._thresholds or equal_steps(len(routes))
        rung = bisect_right(thresholds, score)
        if rung == 0:
            compared = f"below {thresholds[0]:.2f}" if thresholds else "the only route"
        else:
            compared = f"at least {thresholds[rung - 1]:.2f}"
        return routes[rung], f"{score:.2f}, {compared}"


def equal_steps(routes: int) -> list[float]:
    """Thresholds that give every route an equal part of the scores."""
    return [step / routes for step in range(1, routes)]


def check_thresholds(thresholds: Sequence[float] | None, routes: int) -> None:
    """Raises InvalidRequest unless there is one between every two routes, rising within (0, 1)."""
    if thresholds is None:
        return
    if len(thresholds) != routes - 1:
        raise InvalidRequest("gateway.thresholds", list(thresholds), f"{routes} routes need {routes - 1} of them")
    if not all(low < high for low, high in pairwise((0.0, *thresholds, 1.0))):
        raise InvalidRequest("gateway.thresholds", list(thresholds), "they must rise, above 0 and below 1")
