"""A router's failure costs no request."""

from __future__ import annotations

import math

import pytest

from router_gateway.routing.fallback import FallbackRouter
from router_gateway.routing.router import Judgement, Query

QUERY = Query(("hello",), ("weak", "strong"))


class Scripted:
    def __init__(self, answer: Judgement | Exception) -> None:
        self._answer = answer

    def judge(self, query: Query) -> Judgement:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_a_proper_judgement_passes_unchanged() -> None:
    judgement = Judgement("weak", 0.2, "why", "length")
    assert FallbackRouter(Scripted(judgement)).judge(QUERY) is judgement


@pytest.mark.parametrize(
    "answer",
    [
        ValueError("broken"),
        Judgement("gone", 0.5, "", "content"),
        Judgement("weak", math.nan, "", "content"),
        Judgement("weak", 0.5, "", "gain", qualities=(0.5,)),
    ],
)
def test_a_failure_takes_the_dearest_route_and_says_so(answer: Judgement | Exception) -> None:
    judgement = FallbackRouter(Scripted(answer)).judge(QUERY)
    assert (judgement.route, judgement.kind) == ("strong", "fallback")
    assert "router" in judgement.reason


def test_the_operator_may_name_another_route() -> None:
    assert FallbackRouter(Scripted(ValueError()), "weak").judge(QUERY).route == "weak"
