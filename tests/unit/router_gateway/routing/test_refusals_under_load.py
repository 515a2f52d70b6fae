"""Refusals by objectives under a simulated load: one shard, prompts one after the other, in virtual time."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest

from router_gateway.routing.objectives import Objectives
from router_gateway.routing.router import Ladder, Query, RouteDecision
from router_gateway.routing.ttft_predictor import TrackedRequest
from stitch.errors import ObjectivesUnmet
from tests.unit.router_gateway.routing.test_selector import SelectorSetup

REQUESTS = 500
# Of a prompt, 100 tokens; the ratio is that of a model of 1.5B and one of 0.5B.
SECONDS = {"weak": 1.0, "strong": 3.0}
STRONG_SHARE = 0.6
OBJECTIVE_SECONDS = 3.0, 24.0


class Scored:
    """A router by a score that the test sets."""

    score = 0.0

    def decide(self, query: Query) -> RouteDecision:
        route, compared = Ladder((0.5,)).pick(self.score, query.routes, query.pressure)
        return RouteDecision(route, self.score, compared, "content")


@dataclass
class Outcome:
    refused: int = 0
    answered: int = 0
    kept: int = 0


def simulate(load: float, cheaper_under_load: bool) -> Outcome:
    """Sends requests at `load` times the rate that the shard bears of the router's mix."""
    setup, router, draw, outcome = SelectorSetup(), Scored(), random.Random(1), Outcome()
    for route, seconds in SECONDS.items():
        setup.learn(route, seconds / 100)
    setup.selector = setup.selector_of(router, cheaper_under_load)
    rate = load / (STRONG_SHARE * SECONDS["strong"] + (1 - STRONG_SHARE) * SECONDS["weak"])
    pending: deque[tuple[float, TrackedRequest]] = deque()
    at = free_at = setup.now
    for _ in range(REQUESTS):
        at += draw.expovariate(rate)
        while pending and pending[0][0] <= at:
            setup.now, computed = pending.popleft()
            computed.prompt_computed()
            computed.text_sent()
        setup.now = at
        router.score = draw.uniform(0.5, 0.9) if draw.random() < STRONG_SHARE else draw.uniform(0.1, 0.5)
        seconds = draw.uniform(*OBJECTIVE_SECONDS)
        try:
            route = setup.ask(objectives=Objectives(max_ttft_seconds=seconds)).route
        except ObjectivesUnmet:
            outcome.refused += 1
            continue
        free_at = max(at, free_at) + SECONDS[route] * draw.lognormvariate(0, 0.1)
        pending.append((free_at, setup.predictor.track(100, route)))
        outcome.answered += 1
        outcome.kept += free_at - at <= seconds
    return outcome


@pytest.mark.parametrize("load", [1.5, 2.0])
def test_cheaper_routes_under_load_spare_four_refusals_of_ten_and_keep_objectives(load: float) -> None:
    today, cheaper = simulate(load, cheaper_under_load=False), simulate(load, cheaper_under_load=True)
    assert today.refused > REQUESTS / 10
    assert cheaper.refused <= 0.6 * today.refused
    assert cheaper.kept >= 0.95 * cheaper.answered
