"""The route decision inside a pass: which route a session takes, by the hidden states of its prompt's first tokens.

`decide_inside_pass` computes the layers that all routes share, lets the `RouteProbe` decide for each segment that has
candidates, and computes the remaining layers of the routes that continue on this shard. The hidden states of a segment
are those of a pass in which its route was known from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from stitch.thresholds import ThresholdSource, choose_routes, gain_score
from stitch_server.devices import to_device_async
from stitch_server.engine.types import LayerRange, RouteDecision, Segment
from stitch_server.model.probe import Probe


class RouteProbe:
    """A trained probe, its current thresholds, and the route for prompts whose gains are not finite."""

    def __init__(self, probe: Probe, thresholds: ThresholdSource, fallback_route: str | None = None) -> None:
        self._probe = probe
        self._thresholds = thresholds
        self._fallback_route = fallback_route or probe.binding.routes[-1]

    @property
    def layer(self) -> int:
        """The probe reads the hidden states after this many layers."""
        return self._probe.binding.layer

    @property
    def tokens(self) -> int:
        """The probe reads the hidden states of at most this many tokens of a prompt."""
        return self._probe.binding.tokens

    def decide(self, hidden: Tensor, candidates: Sequence[str]) -> RouteDecision:
        """Selects one of the candidates, cheapest first, by a prompt's hidden states `[tokens or more, hidden]`."""
        gains, thresholds = self._probe.gains(hidden[: self.tokens]), self._thresholds.current()
        if not all(map(math.isfinite, gains)):
            return fallback_decision(self._fallback_route, candidates, "the probe's gains are not finite")
        index = int(choose_routes(np.array([gains]), np.array(thresholds))[0])
        preferred = self._probe.binding.routes[index]
        score = gain_score(gains[-1], self._thresholds.calibration, self._probe.percentiles)
        return _restrict(RouteDecision(preferred, score, gains, thresholds), candidates)


def fallback_decision(route: str | None, candidates: Sequence[str], failure: str) -> RouteDecision:
    """The decision if the probe can't decide: `route`, by default the most expensive candidate."""
    return _restrict(RouteDecision(route or candidates[-1], failure=failure), candidates)


def _restrict(decision: RouteDecision, candidates: Sequence[str]) -> RouteDecision:
    """`decision` if its route is a candidate, else one for the most expensive candidate."""
    if decision.route in candidates:
        return decision
    return replace(decision, route=candidates[-1], preferred=decision.route)


def decide_inside_pass(
    probe: RouteProbe,
    layer_ranges: Mapping[str, LayerRange],
    run_layers: Callable[[Sequence[Segment], Tensor], Tensor],
    segments: Sequence[Segment],
    hidden: Tensor,
) -> tuple[Tensor, dict[int, RouteDecision]]:
    """Hidden states `[tokens, hidden]` through the layers of all segments, and the decisions by segment index.

    `layer_ranges` are those of the routes on this shard. Up to the probe's layer all segments pass the same layers;
    those that continue are then gathered, sorted by their last layer, into a second run.
    """
    shared = [replace(one, layers=LayerRange(one.layers.first, probe.layer)) for one in segments]
    hidden = run_layers(shared, hidden)
    bounds = [0, *accumulate(one.length for one in segments)]
    decisions = {
        index: probe.decide(hidden[bounds[index] : bounds[index + 1]], one.candidates)
        for index, one in enumerate(segments)
        if one.candidates
    }
    ends = [
        layer_ranges[decisions[index].route].end if index in decisions else one.layers.end
        for index, one in enumerate(segments)
    ]
    continuing = [index for index, end in enumerate(ends) if end > probe.layer]
    continuing.sort(key=lambda index: -ends[index])
    if continuing:
        rows = torch.cat([torch.arange(bounds[index], bounds[index + 1]) for index in continuing])
        rows = to_device_async(rows, hidden.device)
        remaining = [replace(segments[index], layers=LayerRange(probe.layer, ends[index])) for index in continuing]
        hidden[rows] = run_layers(remaining, hidden[rows])
    return hidden, decisions
