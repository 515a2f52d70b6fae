"""The learned router of texts: an artifact's gains, compared with thresholds, decide the route."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from router_gateway.routing.learned.artifact import RouterArtifact, load_router
from router_gateway.routing.learned.model import gains_of
from router_gateway.routing.router import Query, RouteDecision, raised
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
    """Decides for the route whose expected gain over the cheapest exceeds its threshold by most."""

    def __init__(self, artifact: RouterArtifact, thresholds: ThresholdSource | None = None) -> None:
        self._artifact = artifact
        self._thresholds = thresholds or FixedThresholds(artifact.thresholds)

    @property
    def routes(self) -> tuple[str, ...]:
        """The routes that it was trained for, cheapest first."""
        return self._artifact.model.routes

    @property
    def calibration(self) -> Thresholds | None:
        """The calibration in force; None where the thresholds are those of its training."""
        return self._thresholds.calibration

    def decide(self, query: Query) -> RouteDecision:
        """The route for a query. Raises InvalidRequest where its routes differ from those of the training."""
        if query.routes != self.routes:
            raise InvalidRequest("routes", query.routes, f"the router was trained for {', '.join(self.routes)}")
        qualities = self._artifact.model.qualities("\n".join(query.turns))
        gains = gains_of(qualities)
        thresholds = raised(self._thresholds.current(), query.pressure)
        rung = int(choose_routes(gains[None, :], np.array(thresholds))[0])
        why, worth = decision_reason("gain", gains.tolist(), thresholds, rung), tuple(qualities.tolist())
        share = gain_score(float(gains[-1]), self.calibration, self._artifact.gain_percentiles)
        return RouteDecision(self.routes[rung], share, why, "gain", worth)


def open_learned_router(path: Path, thresholds: Path | None = None) -> LearnedRouter:
    """The router in the artifact at `path`, with the thresholds of a calibration file where there is one.

    Raises InvalidRequest where either file is invalid, or the thresholds were calibrated for another router.
    """
    artifact = load_router(path)
    if thresholds is None:
        return LearnedRouter(artifact)
    return LearnedRouter(artifact, ReloadingThresholds(thresholds, artifact.fingerprint, len(artifact.model.routes)))
