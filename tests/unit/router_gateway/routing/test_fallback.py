"""A router's failure costs no request."""

from __future__ import annotations

import math

import pytest

from router_gateway.routing.fallback import FallbackRouter
from router_gateway.routing.router import Query, RouteDecision

QUERY = Query(("hello",), ("weak", "strong"))


class Scripted:
    def __init__(self, answer: RouteDecision | Exception) -> None:
        self._answer = answer

    def judge(self, query: Query) -> RouteDecision:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_a_proper_judgement_passes_unchanged() -> None:
    decision = RouteDecision("weak", 0.2, "why", "length")
    assert FallbackRouter(Scripted(decision)).judge(QUERY) is decision


@pytest.mark.parametrize(
    "answer",
    [
        ValueError("broken"),
        RouteDecision("gone", 0.5, "", "content"),
        RouteDecision("weak", math.nan, "", "content"),
        RouteDecision("weak", 0.5, "", "gain", qualities=(0.5,)),
    ],
)
def test_a_failure_takes_the_dearest_route_and_says_so(answer: RouteDecision | Exception) -> None:
    decision = FallbackRouter(Scripted(answer)).judge(QUERY)
    assert (decision.route, decision.kind) == ("strong", "fallback")
    assert "router" in decision.reason


def test_the_operator_may_name_another_route() -> None:
    assert FallbackRouter(Scripted(ValueError()), "weak").judge(QUERY).route == "weak"
