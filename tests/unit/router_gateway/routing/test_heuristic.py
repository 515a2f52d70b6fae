"""The first router: sensible on plain cases, and an answer for any text."""

from __future__ import annotations

import pytest

from router_gateway.routing.features import features
from router_gateway.routing.heuristic import WEIGHTS, HeuristicRouter
from router_gateway.routing.router import REASON_KINDS, Ladder, Query, RouteDecision

ROUTES = ("weak", "strong")
DUCKS = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins with four. "
    "She sells the remainder for $2 per egg. How much does she make every day?"
)


def judged(*turns: str, routes: tuple[str, ...] = ROUTES) -> RouteDecision:
    return HeuristicRouter(Ladder()).decide(Query(turns, routes))


@pytest.mark.parametrize("text", ["Hello", "What is the capital of France?", "Write a haiku about autumn."])
def test_small_talk_is_weak(text: str) -> None:
    assert judged(text).route == "weak"


@pytest.mark.parametrize(
    "text", [DUCKS, "Refactor this so that it must handle None:\ndef f(x):\n    return x + 1", "x " * 3_000]
)
def test_hard_or_long_work_is_strong(text: str) -> None:
    assert judged(text).route == "strong"


def test_a_follow_up_is_judged_with_what_came_before() -> None:
    assert judged("commit it").route == "weak"
    assert judged(DUCKS, "commit it").route == "strong"


def test_the_reason_names_what_weighed_most() -> None:
    decision = judged(DUCKS)
    assert "34 words" in decision.reason
    assert "constraint" in decision.reason
    assert decision.reason.endswith(f"{decision.score:.2f}, at least 0.50")
    assert decision.kind == "content"
    assert judged("Hello").kind == "length"


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "x" * 100_000, "😀" * 50_000, "1" * 9_999, "{;\n" * 5_000, "𝕏\u202e\ufffd"]
)
@pytest.mark.parametrize("routes", [("one",), ROUTES, ("a", "b", "c", "d")])
def test_any_text_has_a_judgement(text: str, routes: tuple[str, ...]) -> None:
    decision = judged(text, routes=routes)
    assert decision.route in routes
    assert 0 < decision.score < 1
    assert decision.kind in REASON_KINDS
    assert len(decision.reason) < 200


def test_no_turn_at_all_has_a_judgement() -> None:
    assert judged().route == "weak"


def test_every_feature_has_a_weight_and_the_other_way_round() -> None:
    assert {feature.name for feature in features([""])} == set(WEIGHTS)
