"""Whether the router does what its calibration promised: gauges, and a warning where texts change. Judges nothing.

Counts the judgements that decided a route, not requests that name one, nor conversations that keep one,
nor objectives that leave only one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from router_gateway.metrics import Metrics
from router_gateway.routing.drift import Latest
from router_gateway.routing.router import RouteDecision
from stitch.thresholds import Thresholds

_log = logging.getLogger(__name__)

# The alert in deploy/alerts.yml has the same. A budget of .30 may then have become a share of .15 or .45.
DRIFT_LIMIT = 0.15
# Below this share of it the drift counts as over.
_OVER = 0.8


class DriftMonitor:
    """`calibration` says what the router is calibrated to now; None in place of it: its scores are no shares."""

    def __init__(self, metrics: Metrics, calibration: Callable[[], Thresholds | None] | None) -> None:
        self._metrics = metrics
        self._calibration = calibration
        self._latest = Latest()
        self._known: Thresholds | None = None
        self._drifted = False
        self._metrics.route_drift.set(math.nan)
        self._compare_with(None)

    def judged(self, decision: RouteDecision, routes: Sequence[str]) -> None:
        """A request takes its route by this judgement; `routes` are all there are, cheapest first."""
        if decision.kind in ("requested", "conversation") or decision.score is None:
            return
        calibration = self._calibration() if self._calibration is not None else None
        if calibration is not self._known:
            self._compare_with(calibration)
        self._latest.add(decision.route, decision.score)
        shares = {route: self._latest.share(route) for route in routes}
        for route, share in shares.items():
            self._metrics.route_share.labels(route=route).set(share)
        costs = _costs(calibration, len(routes))
        self._metrics.route_mean_cost.set(sum(share * cost for share, cost in zip(shares.values(), costs, strict=True)))
        if self._calibration is not None:
            self._look(self._latest.drift())

    def _compare_with(self, calibration: Thresholds | None) -> None:
        """What was judged by other thresholds says nothing about these."""
        self._known = calibration
        self._latest = Latest()
        self._metrics.route_budget.set(math.nan if calibration is None else calibration.budget)

    def _look(self, drift: float) -> None:
        self._metrics.route_drift.set(drift)
        if not self._drifted and drift > DRIFT_LIMIT:
            self._drifted = True
            _log.warning("scores are %.2f off those of the calibration, more than %.2f", drift, DRIFT_LIMIT)
        elif self._drifted and drift < _OVER * DRIFT_LIMIT:
            self._drifted = False
            _log.warning("scores are like those of the calibration again, %.2f off", drift)


def _costs(calibration: Thresholds | None, routes: int) -> Sequence[float]:
    """Of the routes, from 0 to 1."""
    if calibration is not None and calibration.costs is not None:
        return calibration.costs
    return [rung / max(routes - 1, 1) for rung in range(routes)]
