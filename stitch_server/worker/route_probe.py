"""Which route an undecided session takes, by its first hidden states. Knows neither links nor batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from stitch.thresholds import ThresholdSource, choose_routes, gain_score
from stitch_server.engine.types import RouteDecision
from stitch_server.model.probe import Probe


class RouteProbe:
    """A probe with the thresholds of this moment, and the route where it has no proper answer."""

    def __init__(self, probe: Probe, thresholds: ThresholdSource, fallback_route: str | None = None) -> None:
        self._probe = probe
        self._thresholds = thresholds
        self._fallback_route = fallback_route or probe.binding.routes[-1]

    @property
    def layer(self) -> int:
        """The states are those behind so many layers."""
        return self._probe.binding.layer

    @property
    def tokens(self) -> int:
        """Of a prompt's first states so many are read."""
        return self._probe.binding.tokens

    def judge(self, states: Tensor, candidates: Sequence[str]) -> RouteDecision:
        """One of the candidates, cheapest first, for a prompt whose states `[tokens or more, hidden]` these are."""
        gains, thresholds = self._probe.gains(states[: self.tokens]), self._thresholds.current()
        if not all(map(math.isfinite, gains)):
            return fallback(self._fallback_route, candidates, "the probe's gains are not finite")
        rung = int(choose_routes(np.array([gains]), np.array(thresholds))[0])
        preferred = self._probe.binding.routes[rung]
        share = gain_score(gains[-1], self._thresholds.calibration, self._probe.percentiles)
        return among(candidates, RouteDecision(preferred, share, gains, thresholds))


def fallback(route: str | None, candidates: Sequence[str], why: str) -> RouteDecision:
    """The verdict where nobody judges; without a `route` the dearest."""
    return among(candidates, RouteDecision(route or candidates[-1], failure=why))


def among(candidates: Sequence[str], decision: RouteDecision) -> RouteDecision:
    """The same where its route is a candidate; else the dearest candidate."""
    if decision.route in candidates:
        return decision
    return replace(decision, route=candidates[-1], preferred=decision.route)
