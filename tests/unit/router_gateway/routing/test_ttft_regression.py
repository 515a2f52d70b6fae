"""A line through what was measured, and a bound that nearly everything keeps to. All times are made up."""

from __future__ import annotations

import random

import pytest

from router_gateway.routing.ttft_regression import LEAST_SAMPLES, MAX_AGE_SECONDS, WINDOW, TtftLine

ENOUGH = 2 * LEAST_SAMPLES


def seconds_of(tokens: float) -> float:
    return 0.05 + 0.001 * tokens


def learned(count: int = ENOUGH, at: float = 0.0) -> TtftLine:
    line = TtftLine()
    for index in range(count):
        tokens = 10.0 + 97 * index % 500
        line.observe(tokens, seconds_of(tokens), at)
    return line


def test_nothing_is_promised_before_enough_was_seen() -> None:
    assert TtftLine().bound(100, 0.0) is None
    assert learned(ENOUGH - 1).bound(100, 0.0) is None
    assert learned(ENOUGH).bound(100, 0.0) is not None


@pytest.mark.parametrize("tokens", [1, 100, 5_000])
def test_an_exact_line_is_found_and_goes_on_beyond_what_was_seen(tokens: float) -> None:
    assert learned().bound(tokens, 0.0) == pytest.approx(seconds_of(tokens))


def test_what_is_old_is_forgotten() -> None:
    line = learned(at=10.0)
    assert line.bound(100, 10.0 + MAX_AGE_SECONDS) is not None
    assert line.bound(100, 10.1 + MAX_AGE_SECONDS) is None


def test_a_route_that_became_slower_is_believed() -> None:
    line = learned(WINDOW)
    for index in range(2 * WINDOW):
        tokens = 10.0 + 97 * index % 500
        line.observe(tokens, 4 * seconds_of(tokens), 1.0)
        # While old and new are mixed, nothing is promised that the new pace doesn't keep, but for the first two.
        assert index < 2 or (line.bound(100, 1.0) or 0) >= 0.99 * 4 * seconds_of(100)
    assert line.bound(100, 1.0) == pytest.approx(4 * seconds_of(100))


def test_one_accident_spoils_no_bound() -> None:
    line = learned(WINDOW)
    line.observe(100, 100 * seconds_of(100), 0.0)
    assert line.bound(100, 0.0) == pytest.approx(seconds_of(100), rel=0.05)


def test_prompts_of_one_length_make_a_level() -> None:
    line = TtftLine()
    for _ in range(ENOUGH):
        line.observe(64, 0.2, 0.0)
    assert line.bound(64, 0.0) == pytest.approx(0.2)
    assert line.bound(640, 0.0) == pytest.approx(0.2)


def test_a_longer_prompt_is_never_promised_sooner() -> None:
    line = TtftLine()
    for index in range(ENOUGH):
        line.observe(10.0 * (index + 1), 1.0 / (index + 1), 0.0)
    assert (line.bound(500, 0.0) or 0) >= (line.bound(10, 0.0) or 0) > 0


def test_a_negative_time_is_never_promised() -> None:
    line = TtftLine()
    for index in range(ENOUGH):
        line.observe(100.0 * (index + 1), 0.01 * (index + 1) ** 2, 0.0)
    assert (line.bound(1, 0.0) or 0) > 0


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_most_of_what_comes_keeps_to_its_bound(spread: float) -> None:
    draw = random.Random(1)
    line, kept, asked = TtftLine(), 0, 0
    for index in range(1_000):
        tokens = draw.uniform(10, 1_000)
        seconds = seconds_of(tokens) * draw.lognormvariate(0, spread)
        bound = line.bound(tokens, float(index) / 10)
        if bound is not None:
            asked += 1
            kept += seconds <= bound
        line.observe(tokens, seconds, float(index) / 10)
    assert asked == 1_000 - ENOUGH
    assert 0.95 <= kept / asked < 1


def test_a_bound_is_no_wider_than_what_was_seen() -> None:
    draw = random.Random(1)
    line = TtftLine()
    for _ in range(WINDOW):
        tokens = draw.uniform(10, 1_000)
        line.observe(tokens, seconds_of(tokens) * draw.uniform(0.9, 1.1), 0.0)
    assert seconds_of(500) <= (line.bound(500, 0.0) or 0) <= 1.3 * seconds_of(500)
