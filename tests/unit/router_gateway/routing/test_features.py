"""Each feature sees what it is for, and not what it is not for."""

from __future__ import annotations

import pytest

from router_gateway.routing.features import EXCERPT_CHARACTERS, features


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
def test_a_sign_is_seen(name: str, text: str) -> None:
    assert values(text)[name] > 0


def test_plain_words_show_nothing_but_their_number() -> None:
    found = values("Tell me about the old town")
    assert found.pop("length") > 0
    assert set(found.values()) == {0.0}


def test_one_lettered_line_is_no_choice() -> None:
    assert values("A. Introduction")["choice"] == 0


def test_a_longer_text_counts_more_and_never_more_than_one() -> None:
    lengths = [values("word " * count)["length"] for count in (0, 1, 10, 100, 1_000, 100_000)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 1


def test_a_script_without_spaces_has_words() -> None:
    assert values("这是一个没有空格的很长的句子" * 10)["length"] > values("short")["length"]


def test_every_turn_of_the_user_counts() -> None:
    found = values("def f(x): return x == 1", "commit it")
    assert found["code"] > 0
    assert found["turns"] > 0


def test_what_stands_at_the_end_of_a_long_text_is_seen() -> None:
    filler = "word " * EXCERPT_CHARACTERS
    assert values(f"{filler}\nExplain why.")["reasoning"] > 0


def test_a_number_is_shown_as_a_person_says_it() -> None:
    shown = {feature.name: feature.shown for feature in features(["Explain 1 + 1"])}
    assert shown["length"] == "4 words"
    assert shown["reasoning"] == "1 reasoning word"
    assert shown["numbers"] == "2 numbers"
