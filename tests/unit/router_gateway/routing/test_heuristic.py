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
        ("reasoning", "Erkla\N{COMBINING DIAERESIS}re mir das"),
        ("reasoning", "为什么天空是蓝色的？"),
        ("reasoning", "왜 하늘은 파란가요?"),
        ("reasoning", "なぜ空は青いのですか"),
        ("reasoning", "ｗｈｙ is the sky blue?"),
        ("numbers", "他有１２个苹果"),
        ("maths", "１７×２３＝？"),
        ("choice", "哪一个？\nＡ．红\nＢ．绿"),
        ("choice", "哪一个？\n（A）红\n（B）绿"),
        ("choice", "哪一个？\nA、红\nB、绿"),
        ("constraints", "必须恰好有两行"),
        ("constraints", "1、一\n2、二"),
        ("constraints", "반드시 두 줄로"),
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


@pytest.mark.parametrize(
    "text",
    [
        "Hello",
        "What is the capital of France?",
        "Write a haiku about autumn.",
        "你好",
        "法国的首都是哪里？",
        "フランスの首都はどこですか",
        "프랑스의 수도는 어디인가요?",
        "Какая столица у Франции?",
    ],
)
def test_small_talk_takes_the_weak_route(text: str) -> None:
    assert decide(text).route == "weak"


@pytest.mark.parametrize(
    "text", [DUCKS, "Refactor this so that it must handle None:\ndef f(x):\n    return x + 1", "x " * 3_000]
)
def test_hard_or_long_task_takes_the_strong_route(text: str) -> None:
    assert decide(text).route == "strong"


@pytest.mark.parametrize(
    "text",
    [
        "Prove step by step that the square root of 2 is irrational.",
        "请一步一步证明根号二是无理数。",
        "請逐步證明根號二是無理數，並解釋每一步。",
        "２の平方根が無理数であることを、段階的に証明してください。",
        "2의 제곱근이 무리수임을 단계별로 증명하시오.",
        "Докажи по шагам, что корень из 2 иррационален.",
        "Demuestra paso a paso que la raíz de 2 es irracional.",
        "Démontre étape par étape que la racine de 2 est irrationnelle.",
        "Ｐｒｏｖｅ ｓｔｅｐ ｂｙ ｓｔｅｐ that the square root of ２ is irrational.",
    ],
)
def test_proof_takes_the_strong_route_in_any_script(text: str) -> None:
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
