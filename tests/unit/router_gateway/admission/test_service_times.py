"""Tests of what is learned from answers: their lengths, and seconds per token beside others."""

from __future__ import annotations

import pytest

from router_gateway.admission.service_times import (
    MAX_AGE_SECONDS,
    MIN_SAMPLES,
    WINDOW,
    AnswerLengths,
    DecodeTimes,
    mean,
    nearly_all,
)


def decode_times(*running: int, seconds: float = 0.02, more: float = 0.005) -> DecodeTimes:
    """Learned at these numbers of running requests, from passes of `seconds` and `more` for each request."""
    times = DecodeTimes()
    for number in running:
        for _ in range(3 * MIN_SAMPLES):
            times.observe(number, seconds + more * number, at=0.0)
    return times


def test_lengths_are_unknown_with_few_answers() -> None:
    lengths = AnswerLengths()
    for _ in range(MIN_SAMPLES - 1):
        lengths.observe("blue", "weak", 5, ended_itself=True)
    assert lengths.tokens_within("blue", "weak", 100) == []
    assert (mean([], 100), nearly_all([], 100)) == (100, 100)


def test_lengths_are_of_the_tenant_and_the_route_or_of_all_its_routes() -> None:
    lengths = AnswerLengths()
    for tokens in range(10, 20):
        lengths.observe("blue", "weak", tokens, ended_itself=True)
    assert lengths.tokens_within("blue", "weak", 100) == list(range(10, 20))
    assert lengths.tokens_within("blue", "", 15) == [10, 11, 12, 13, 14, 15, 15, 15, 15, 15]
    assert lengths.tokens_within("blue", "strong", 100) == lengths.tokens_within("red", "weak", 100) == []


def test_answer_cut_at_a_lower_limit_says_nothing_of_a_higher_one() -> None:
    lengths = AnswerLengths()
    for _ in range(WINDOW // 2):
        lengths.observe("blue", "weak", 16, ended_itself=False)
        lengths.observe("blue", "weak", 60, ended_itself=True)
    assert nearly_all(lengths.tokens_within("blue", "weak", 16), 16) == 16
    assert set(lengths.tokens_within("blue", "weak", 512)) == {60}


def test_nearly_all_is_exceeded_by_one_in_ten() -> None:
    assert nearly_all(list(range(1, 101)), 0) == 90
    assert mean([1, 2, 3], 0) == 2


def test_seconds_per_token_lie_between_observed_numbers() -> None:
    times = decode_times(4, 16)
    assert times.seconds(4) == pytest.approx(0.04)
    assert times.seconds(10) == pytest.approx(0.07)
    assert times.seconds(1) == pytest.approx(0.04)
    assert times.seconds(64) == pytest.approx(0.2)
    assert DecodeTimes().seconds(4) is None


def test_factor_covers_nearly_all_answers() -> None:
    times = decode_times(4)
    assert times.factor == 1.0
    for _ in range(2):
        times.observe(4, 0.08, at=0.0)
    assert times.factor == pytest.approx(1.9, abs=0.15)


def test_numbers_without_answers_are_forgotten() -> None:
    times = decode_times(4, 16, 64)
    times.observe(16, 0.1, at=MAX_AGE_SECONDS + 1)
    assert times.seconds(4) == times.seconds(16) == pytest.approx(0.1)


def test_number_that_may_run_within_seconds_per_token() -> None:
    times = decode_times(4, 16)
    assert times.running_within(0.07) == pytest.approx(10, abs=1)
    assert times.running_within(0.001) == pytest.approx(0, abs=1)
    assert times.running_within(10.0) == 4096
    assert DecodeTimes().running_within(0.001) is None
