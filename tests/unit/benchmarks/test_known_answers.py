"""Prompts with known answers: what is computed, what is found in a file of prompts, and what is left out."""

from __future__ import annotations

import random

import pytest

from benchmarks.quality.known_answers import SHORT, short_rows, to_function

HALF = 'from math import floor\n\n\ndef half(number):\n    """Returns the half.\n    >>> half(3)\n    1\n    """\n'


def test_short_rows_differ_and_have_every_sort_alike() -> None:
    rows = short_rows(60, random.Random(0))
    assert len({row["prompt"] for row in rows}) == 60
    tasks = [row["task"] for row in rows]
    assert {tasks.count(make.__name__) for make in SHORT} == {10}
    assert rows == short_rows(60, random.Random(0))


def test_short_answers_are_those_of_the_questions() -> None:
    by_prompt = {row["prompt"]: row["answer"] for row in short_rows(200, random.Random(0))}
    sums = {prompt: answer for prompt, answer in by_prompt.items() if prompt.startswith("What is") and " + " in prompt}
    assert sums
    for prompt, answer in sums.items():
        one, _, other = prompt.removeprefix("What is ").partition("?")[0].split()
        assert int(one) + int(other) == int(answer)
    assert by_prompt["What is the capital of Peru? Answer with its name alone."] == "Lima"


def test_more_short_rows_than_there_are_end_in_an_error() -> None:
    with pytest.raises(ValueError, match="no 400 different"):
        short_rows(400, random.Random(0))


def test_function_of_a_prompt_has_its_imports_and_examples() -> None:
    found = to_function(HALF)
    assert found is not None
    assert (found.module, found.name) == (None, "half")
    assert found.header.startswith("from math import floor")
    assert ">>> half(3)\n1" in found.doc


@pytest.mark.parametrize(
    "prompt",
    ["Write a function.", "def half(number):\n    return 1", HALF.replace("    1\n", ""), f"{HALF}\n\n{HALF}"],
)
def test_prompt_that_is_not_one_function_with_examples_is_left_out(prompt: str) -> None:
    assert to_function(prompt) is None
