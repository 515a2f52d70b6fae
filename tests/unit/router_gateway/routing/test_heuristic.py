"""Tests of the features, one by one, and of the heuristic router's routes and reasons."""

from __future__ import annotations

import pytest

from router_gateway.routing.heuristic import EXCERPT_CHARACTERS, WEIGHTS, HeuristicRouter, features
from router_gateway.routing.router import REASON_KINDS, Ladder, Query, RouteDecision


def values(*turns: str) -> dict[str, float]:
    return {feature.name: feature.value for feature in features(turns)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("code", "```python\nprint(1)\n```"),
        ("code", "def area(r):\n    return 3 * r"),
        ("code", "if (x == 1) {\n  y();\n}"),
        ("numbers", "He had 12 apples, then 7"),
        ("maths", "Solve x^2 = 4"),
        ("maths", r"\frac{1}{2}"),
        ("maths", "What is 17 * 23?"),
        ("reasoning", "Why is the sky blue?"),
        ("reasoning", "ERKLÄRE mir das"),
        ("choice", "Which one?\nA. red\nB. green\nC. blue"),
        ("constraints", "It must have exactly two verses"),
        ("constraints", "Do this:\n- one\n- two"),
    ],
)
def test_feature_is_found_in_its_example(name: str, text: str) -> None:
    assert values(text)[name] > 0


def test_plain_words_have_only_a_length() -> None:
    found = values("Tell me about the old town")
    assert found.pop("length") > 0
    assert set(found.values()) == {0.0}


def test_one_lettered_line_is_no_choice() -> None:
    assert values("A. Introduction")["choice"] == 0


def test_length_grows_up_to_1() -> None:
    lengths = [values("word " * count)["length"] for count in (0, 1, 10, 100, 1_000, 100_000)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 1


def test_script_without_spaces_has_words() -> None:
    assert values("这是一个没有空格的很长的句子" * 10)["length"] > values("short")["length"]


def test_features_cover_every_turn() -> None:
    found = values("def f(x): return x == 1", "commit it")
    assert found["code"] > 0
    assert found["turns"] > 0


def test_features_cover_the_end_of_a_long_text() -> None:
    filler = "word " * EXCERPT_CHARACTERS
    assert values(f"{filler}\nExplain why.")["reasoning"] > 0


def test_description_uses_singular_and_plural() -> None:
    shown = {feature.name: feature.description for feature in features(["Explain 1 + 1"])}
    assert shown["length"] == "4 words"
    assert shown["reasoning"] == "1 reasoning word"
    assert shown["numbers"] == "2 numbers"


ROUTES = ("weak", "strong")
DUCKS = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins with four. "
    "She sells the remainder for $2 per egg. How much does she make every day?"
)


def decide(*turns: str, routes: tuple[str, ...] = ROUTES) -> RouteDecision:
    return HeuristicRouter(Ladder()).decide(Query(turns, routes))


@pytest.mark.parametrize("text", ["Hello", "What is the capital of France?", "Write a haiku about autumn."])
def test_small_talk_takes_the_weak_route(text: str) -> None:
    assert decide(text).route == "weak"


@pytest.mark.parametrize(
    "text", [DUCKS, "Refactor this so that it must handle None:\ndef f(x):\n    return x + 1", "x " * 3_000]
)
def test_hard_or_long_task_takes_the_strong_route(text: str) -> None:
    assert decide(text).route == "strong"


def test_follow_up_is_decided_with_earlier_turns() -> None:
    assert decide("commit it").route == "weak"
    assert decide(DUCKS, "commit it").route == "strong"


def test_reason_names_the_largest_contributions() -> None:
    decision = decide(DUCKS)
    assert "34 words" in decision.reason
    assert "constraint" in decision.reason
    assert decision.reason.endswith(f"{decision.score:.2f}, at least 0.50")
    assert decision.kind == "content"
    assert decide("Hello").kind == "length"


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "x" * 100_000, "😀" * 50_000, "1" * 9_999, "{;\n" * 5_000, "𝕏\u202e\ufffd"]
)
@pytest.mark.parametrize("routes", [("one",), ROUTES, ("a", "b", "c", "d")])
def test_any_text_has_a_decision(text: str, routes: tuple[str, ...]) -> None:
    decision = decide(text, routes=routes)
    assert decision.route in routes
    assert 0 < decision.score < 1
    assert decision.kind in REASON_KINDS
    assert len(decision.reason) < 200


def test_query_without_turns_has_a_decision() -> None:
    assert decide().route == "weak"


def test_features_and_weights_have_the_same_names() -> None:
    assert {feature.name for feature in features([""])} == set(WEIGHTS)
