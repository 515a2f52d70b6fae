"""Tests of the fallback router, of the ladder of thresholds, and of a decision as a message."""

from __future__ import annotations

import math

import pytest

from router_gateway.routing.router import (
    FallbackRouter,
    Ladder,
    Query,
    RouteDecision,
    check_thresholds,
    equal_steps,
)
from stitch.errors import InvalidRequest

QUERY = Query(("hello",), ("weak", "strong"))


class ScriptedRouter:
    def __init__(self, decision: RouteDecision | Exception) -> None:
        self._decision = decision

    def decide(self, query: Query) -> RouteDecision:
        if isinstance(self._decision, Exception):
            raise self._decision
        return self._decision


def test_fallback_router_passes_a_valid_decision_unchanged() -> None:
    decision = RouteDecision("weak", 0.2, "why", "length")
    assert FallbackRouter(ScriptedRouter(decision)).decide(QUERY) is decision


@pytest.mark.parametrize(
    "decision",
    [
        ValueError("broken"),
        RouteDecision("gone", 0.5, "", "content"),
        RouteDecision("weak", math.nan, "", "content"),
        RouteDecision("weak", 0.5, "", "gain", qualities=(0.5,)),
    ],
)
def test_fallback_router_takes_most_expensive_route_when_router_fails(decision: RouteDecision | Exception) -> None:
    fallback = FallbackRouter(ScriptedRouter(decision)).decide(QUERY)
    assert (fallback.route, fallback.kind) == ("strong", "fallback")
    assert "router" in fallback.reason


def test_fallback_router_takes_the_configured_route() -> None:
    assert FallbackRouter(ScriptedRouter(ValueError()), "weak").decide(QUERY).route == "weak"


def test_decision_without_score_becomes_message_with_score_0() -> None:
    message = RouteDecision("weak", None, "the request names it", "requested").to_proto()
    assert (message.route, message.score, message.reason) == ("weak", 0.0, "the request names it")


@pytest.mark.parametrize(
    ("score", "route"),
    [(0.0, "small"), (0.29, "small"), (0.3, "middle"), (0.69, "middle"), (0.7, "large"), (1.0, "large")],
)
def test_ladder_takes_the_costlier_route_at_a_threshold(score: float, route: str) -> None:
    assert Ladder([0.3, 0.7]).pick(score, ["small", "middle", "large"])[0] == route


def test_ladder_describes_the_comparison() -> None:
    assert Ladder().pick(0.25, ["weak", "strong"]) == ("weak", "0.25, below 0.50")
    assert Ladder().pick(0.75, ["weak", "strong"]) == ("strong", "0.75, at least 0.50")


def test_ladder_of_one_route_takes_it() -> None:
    assert Ladder().pick(0.99, ["only"]) == ("only", "0.99, the only route")


def test_equal_steps_give_every_route_an_equal_share() -> None:
    assert equal_steps(4) == [0.25, 0.5, 0.75]
    assert equal_steps(1) == []


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.6], [0.0], [1.0], [float("nan")]])
def test_check_thresholds_refuses_wrong_count_or_range(thresholds: list[float]) -> None:
    with pytest.raises(InvalidRequest, match=r"gateway\.thresholds"):
        check_thresholds(thresholds, 2)


def test_check_thresholds_refuses_descending_values() -> None:
    with pytest.raises(InvalidRequest, match="rise"):
        check_thresholds([0.6, 0.4], 3)


@pytest.mark.parametrize("thresholds", [None, [0.4]])
def test_check_thresholds_accepts_valid_ones(thresholds: list[float] | None) -> None:
    check_thresholds(thresholds, 2)
