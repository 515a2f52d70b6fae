"""Route decisions and answers as lines of text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
from rich.console import Console

from stitch.cli.output import (
    decision_line,
    for_terminal,
    json_line,
    millions,
    seconds,
    sentence,
    show_stream,
    stages_line,
    timing_line,
    tokens_per_second,
)
from stitch.client import Answer, Delta, RouteDecision, Stream
from stitch.errors import StitchError

ANSWER = Answer(
    text="Hi",
    token_ids=(1, 2, 3),
    route="weak",
    score=0.125,
    reason="6 words",
    prompt_tokens=7,
    generated_tokens=11,
    finish_reason="length",
    ttft_seconds=0.5,
    total_seconds=2.5,
    stages={"route": 0.0004, "bottom_prefill": 0.25},
)


def test_decision_line_has_route_score_and_reason() -> None:
    assert decision_line(RouteDecision("weak", 0.125, "6 words", 7)) == "route weak · score 0.12 · 6 words"
    assert decision_line(ANSWER) == "route weak · score 0.12 · 6 words"


def test_timing_line_has_tokens_and_durations() -> None:
    assert timing_line(ANSWER) == (
        "7 prompt tokens · 11 generated (length) · first token 500 ms · total 2.50 s · 5.0 tokens/s"
    )


def test_tokens_per_second_excludes_first_token() -> None:
    assert tokens_per_second(ANSWER) == 5.0


@pytest.mark.parametrize("change", [{"ttft_seconds": None}, {"generated_tokens": 1}, {"total_seconds": 0.5}])
def test_tokens_per_second_is_none_without_further_tokens(change: dict[str, float]) -> None:
    answer = replace(ANSWER, **change)  # type: ignore[arg-type]
    assert tokens_per_second(answer) is None
    assert "tokens/s" not in timing_line(answer)


def test_stages_line_names_stages() -> None:
    assert stages_line(ANSWER) == "route 0.4 ms · bottom prefill 250 ms"


@pytest.mark.parametrize(
    ("duration", "text"),
    [(None, "–"), (0.0, "0 ms"), (0.00123, "1.23 ms"), (0.4567, "457 ms"), (12.345, "12.35 s"), (-1e-6, "0 ms")],
)
def test_seconds_chooses_unit(duration: float | None, text: str) -> None:
    assert seconds(duration) == text


@pytest.mark.parametrize(("count", "text"), [(134_515_008, "134.5 M"), (1_543_714_304, "1.54 B")])
def test_millions_chooses_unit(count: int, text: str) -> None:
    assert millions(count) == text


ATTACK = "a\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\n\tb"


def test_text_for_a_terminal_has_no_control_characters_but_newline_and_tab() -> None:
    assert for_terminal(ATTACK) == "a␛]0;title␇␛[2J�31m␡\n\tb"
    assert for_terminal("é你 👩‍👩‍👧‍👦") == "é你 👩‍👩‍👧‍👦"
    assert "\x1b" not in sentence(StitchError(ATTACK))
    assert not {"\x1b", "\x9b", "\x7f"} & set(json_line(ATTACK))


@pytest.mark.parametrize("terminal", [True, False])
def test_answer_reaches_a_terminal_without_control_characters(terminal: bool) -> None:
    class Answered:
        answer = ANSWER

        def __iter__(self) -> Iterator[RouteDecision | Delta]:
            yield RouteDecision("weak", 0.5, ATTACK, 1)
            yield Delta(ATTACK, (), ())

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, color_system=None)
    show_stream(console, cast(Stream, Answered()))
    # A pipe gets the answer as it is.
    assert ("\x1b]0" in shown.getvalue()) is not terminal
    assert "␛]0" in shown.getvalue()
