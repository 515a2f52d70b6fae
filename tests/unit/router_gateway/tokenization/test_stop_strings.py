"""Tests of stop strings: the text before the first one, for any split into pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from router_gateway.tokenization.stop_strings import StopStrings


def run(stop: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    finder = StopStrings(stop)
    text = "".join(finder.push(piece) for piece in pieces)
    return text + finder.finish(), finder.found


def expected(stop: Sequence[str], text: str) -> tuple[str, bool]:
    """By brute force: the first place where any string ends, and the longest string that ends there."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["\n\n"], "one\n\ntwo"),
        (["END"], "ENENDED"),
        (["abab"], "abaabab!"),
        (["bc", "abcd"], "xabcd"),
        (["aab", "aaab"], "aaaaab"),
        (["你好"], "说你好吗"),
        (["never"], "nevenevenev"),
    ],
)
def test_text_ends_before_the_first_stop_string(stop: list[str], text: str) -> None:
    assert run(stop, [text]) == expected(stop, text)
    assert run(stop, list(text)) == expected(stop, text)


@pytest.mark.parametrize("seed", range(200))
def test_result_does_not_depend_on_the_pieces(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab") for _ in range(30))
    stop = ["".join(draw.choice("ab") for _ in range(draw.randrange(2, 7))) for _ in range(draw.randrange(1, 4))]
    cuts = sorted(draw.sample(range(31), 4))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, 30], strict=True)]
    assert run(stop, pieces) == expected(stop, text)


def test_only_a_possible_prefix_is_held_back() -> None:
    finder = StopStrings(["</s>", "stop"])
    assert finder.push("text </") == "text "
    assert finder.push("st") == "</"
    assert finder.push("art") == "start"


def test_no_text_follows_a_stop_string() -> None:
    finder = StopStrings(["."])
    assert finder.push("One. Two.") == "One"
    assert finder.push("Three") == ""
    assert finder.finish() == ""
    assert finder.found


def test_without_stop_strings_nothing_is_held_back() -> None:
    finder = StopStrings([])
    assert finder.push("anything") == "anything"
    assert not finder.found
