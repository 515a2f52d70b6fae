"""The learned router behind the gateway's interface. Knows no training and no request."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import numpy as np

from router_gateway.routing.interface import Judgement, Query
from router_gateway.routing.text.artefact import TextArtefact, load_router
from router_gateway.routing.text.choice import chosen
from router_gateway.routing.text.model import Floats, gains_of
from router_gateway.routing.text.thresholds import FixedThresholds, Thresholds, ThresholdSource, WatchedThresholds
from stitch.errors import InvalidRequest


class TextRouter:
    """Takes the route whose expected gain over the cheapest exceeds its threshold by most."""

    def __init__(self, artefact: TextArtefact, thresholds: ThresholdSource | None = None) -> None:
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

    def judge(self, query: Query) -> Judgement:
        """The route for a query. Raises InvalidRequest where its routes are not those of the training."""
        if query.routes != self.routes:
            raise InvalidRequest("routes", query.routes, f"the router was trained for {', '.join(self.routes)}")
        qualities = self._artefact.model.qualities("\n".join(query.turns))
        gains = gains_of(qualities)
        thresholds = self._thresholds.current()
        rung = int(chosen(gains[None, :], np.array(thresholds))[0])
        reason, worth = _reason(gains, thresholds, rung), tuple(qualities.tolist())
        return Judgement(self.routes[rung], self._score(gains), reason, "gain", worth)

    def _score(self, gains: Floats) -> float:
        """The share of texts that ask less for the strongest route: of the calibration's, else of the training's."""
        calibration = self.calibration
        of_calibration = None if calibration is None else calibration.gain_percentiles
        percentiles = of_calibration or self._artefact.gain_percentiles
        return bisect_left(percentiles, float(gains[-1])) / len(percentiles)


def open_text_router(path: Path, thresholds: Path | None = None) -> TextRouter:
    """The router of an artefact, with the thresholds of a calibration where there is one.

    Raises InvalidRequest where either file is off, or the thresholds are another router's.
    """
    artefact = load_router(path)
    if thresholds is None:
        return TextRouter(artefact)
    return TextRouter(artefact, WatchedThresholds(thresholds, artefact.fingerprint, len(artefact.model.routes)))


def _reason(gains: Floats, thresholds: tuple[float, ...], rung: int) -> str:
    """The comparison that decided: with the threshold of the route, or of the one that came nearest to its own."""
    if not thresholds:
        return "the only route"
    if rung:
        return f"gain {gains[rung]:.2f} > {thresholds[rung - 1]:.2f}"
    nearest = int(np.argmax(gains[1:] - np.array(thresholds)))
    return f"gain {gains[nearest + 1]:.2f} ≤ {thresholds[nearest]:.2f}"
