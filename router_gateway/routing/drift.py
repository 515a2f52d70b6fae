"""Whether the router keeps the budget of its calibration: shares of routes, drift of scores, and a warning.

A learned router's score is the share of its calibration's texts with a smaller gain of the strongest route, so over
similar texts scores are uniform from 0 to 1. Drift is the largest distance between the empirical distribution of the
latest scores and the uniform one: the statistic of Kolmogorov and Smirnov, 0 to 1. Over unchanged texts, one window of
2,000 in a thousand exceeds 0.044.

Only decisions of the router count: not a route that the request names, nor one that its conversation keeps, nor the
only one that its objectives allow.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from router_gateway.metrics import Metrics
from router_gateway.routing.router import RouteDecision
from stitch.thresholds import Thresholds

_log = logging.getLogger(__name__)

WINDOW = 2_000
# Drift of fewer scores is noise: over unchanged texts, one window of 200 in a thousand exceeds 0.14.
MIN_SCORES = 200
_BINS = 100

# The alert in deploy/prometheus/alerts.yml has the same. A budget of 0.30 may then have become a share of 0.15 or 0.45.
DRIFT_LIMIT = 0.15
# Drift below this share of the limit ends the warning.
_RECOVERED = 0.8


class DecisionWindow:
    """Routes and scores of the latest decisions, at most `window`."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        # Route and score bin.
        self._decisions: deque[tuple[str, int]] = deque()
        self._routes: Counter[str] = Counter()
        self._bins = [0] * (_BINS + 1)

    def add(self, route: str, score: float) -> None:
        """Adds a decision with a score from 0 to 1, and drops the oldest one where the window is full."""
        # Bin b holds the scores above (b - 1) / _BINS, up to b / _BINS.
        entry = route, math.ceil(score * _BINS)
        self._decisions.append(entry)
        self._count(entry, 1)
        if len(self._decisions) > self._window:
            self._count(self._decisions.popleft(), -1)

    def share(self, route: str) -> float:
        """The share of decisions for that route; 0 before the first."""
        return self._routes[route] / max(len(self._decisions), 1)

    def drift(self) -> float:
        """0 to 1; NaN below MIN_SCORES."""
        count = len(self._decisions)
        if count < MIN_SCORES:
            return math.nan
        cumulative = accumulate(self._bins)
        return max(abs(below / count - edge / _BINS) for edge, below in enumerate(cumulative))

    def _count(self, entry: tuple[str, int], by: int) -> None:
        route, edge = entry
        self._routes[route] += by
        self._bins[edge] += by


class DriftMonitor:
    """Sets the gauges of shares, cost and drift, and logs a warning when drift exceeds DRIFT_LIMIT.

    `calibration` returns the router's calibration; None in its place: the router's scores are no shares of texts.
    """

    def __init__(self, metrics: Metrics, calibration: Callable[[], Thresholds | None] | None) -> None:
        self._metrics = metrics
        self._calibration = calibration
        self._latest = DecisionWindow()
        self._current: Thresholds | None = None
        self._drifted = False
        self._metrics.route_drift.set(math.nan)
        self._restart(None)

    def observe(self, decision: RouteDecision, routes: Sequence[str]) -> None:
        """Counts the decision of a request that is answered; `routes` are all routes, cheapest first."""
        if decision.kind in ("requested", "conversation") or decision.score is None:
            return
        calibration = self._calibration() if self._calibration is not None else None
        if calibration is not self._current:
            self._restart(calibration)
        self._latest.add(decision.route, decision.score)
        shares = {route: self._latest.share(route) for route in routes}
        for route, share in shares.items():
            self._metrics.route_share.labels(route=route).set(share)
        costs = _relative_costs(calibration, len(routes))
        self._metrics.route_mean_cost.set(sum(share * cost for share, cost in zip(shares.values(), costs, strict=True)))
        if self._calibration is not None:
            self._observe_drift(self._latest.drift())

    def _restart(self, calibration: Thresholds | None) -> None:
        """Empties the window: decisions by other thresholds are not comparable."""
        self._current = calibration
        self._latest = DecisionWindow()
        self._metrics.route_budget.set(math.nan if calibration is None else calibration.budget)

    def _observe_drift(self, drift: float) -> None:
        self._metrics.route_drift.set(drift)
        if not self._drifted and drift > DRIFT_LIMIT:
            self._drifted = True
            _log.warning("router scores drifted by %.2f from their calibration, limit %.2f", drift, DRIFT_LIMIT)
        elif self._drifted and drift < _RECOVERED * DRIFT_LIMIT:
            self._drifted = False
            _log.warning("router scores are back at their calibration, drift %.2f", drift)


def _relative_costs(calibration: Thresholds | None, routes: int) -> Sequence[float]:
    """[routes], from 0 to 1; equal steps where the calibration states none."""
    if calibration is not None and calibration.costs is not None:
        return calibration.costs
    return [index / max(routes - 1, 1) for index in range(routes)]
