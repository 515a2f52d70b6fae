"""The learned router behind the gateway's interface. Knows no training and no request."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from router_gateway.routing.learned.artifact import RouterArtifact, load_router
from router_gateway.routing.learned.model import gains_of
from router_gateway.routing.router import Query, RouteDecision
from stitch.errors import InvalidRequest
from stitch.thresholds import (
    FixedThresholds,
    ReloadingThresholds,
    Thresholds,
    ThresholdSource,
    choose_routes,
    decision_reason,
    gain_score,
)


class LearnedRouter:
    """Takes the route whose expected gain over the cheapest exceeds its threshold by most."""

    def __init__(self, artefact: RouterArtifact, thresholds: ThresholdSource | None = None) -> None:
        self._artefact = artefact
        self._thresholds = thresholds or FixedThresholds(artefact.thresholds)

    @property
    def routes(self) -> tuple[str, ...]:
        """The routes that it was trained for, cheapest first."""
        return self._artefact.model.routes

    @property
    def calibration(self) -> Thresholds | None:
        """What it is calibrated to now; None where the thresholds are those of its training."""
        return self._thresholds.calibration

    def judge(self, query: Query) -> RouteDecision:
        """The route for a query. Raises InvalidRequest where its routes are not those of the training."""
        if query.routes != self.routes:
            raise InvalidRequest("routes", query.routes, f"the router was trained for {', '.join(self.routes)}")
        qualities = self._artefact.model.qualities("\n".join(query.turns))
        gains = gains_of(qualities)
        thresholds = self._thresholds.current()
        rung = int(choose_routes(gains[None, :], np.array(thresholds))[0])
        why, worth = decision_reason("gain", gains.tolist(), thresholds, rung), tuple(qualities.tolist())
        share = gain_score(float(gains[-1]), self.calibration, self._artefact.gain_percentiles)
        return RouteDecision(self.routes[rung], share, why, "gain", worth)


def open_text_router(path: Path, thresholds: Path | None = None) -> LearnedRouter:
    """The router of an artefact, with the thresholds of a calibration where there is one.

    Raises InvalidRequest where either file is off, or the thresholds are another router's.
    """
    artefact = load_router(path)
    if thresholds is None:
        return LearnedRouter(artefact)
    return LearnedRouter(artefact, ReloadingThresholds(thresholds, artefact.fingerprint, len(artefact.model.routes)))
