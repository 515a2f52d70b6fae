"""The bound of silence follows what is usual among the next shards, within limits."""

from __future__ import annotations

import pytest

from stitch_server.rpc.silence import (
    FEW,
    FIRST_SECONDS,
    LEAST_SECONDS,
    MOST_SECONDS,
    OPENING_SECONDS,
    RECENT,
    SilenceBound,
)


def bound(*silences: float) -> float:
    learned = SilenceBound()
    for seconds in silences:
        learned.learn(seconds)
    return learned.seconds()


def test_bound_is_fixed_while_little_is_known() -> None:
    assert bound(*[0.3] * (FEW - 1)) == FIRST_SECONDS


@pytest.mark.parametrize(
    ("usual", "expected"), [(0.1, LEAST_SECONDS), (0.25, LEAST_SECONDS), (0.5, 2.0), (3.0, MOST_SECONDS)]
)
def test_bound_is_four_usual_silences_within_limits(usual: float, expected: float) -> None:
    assert bound(*[usual] * FEW) == expected


def test_bound_of_openings_is_learned_from_the_first_one() -> None:
    openings = SilenceBound(OPENING_SECONDS, few=1)
    assert (openings.is_learned, openings.seconds()) == (False, OPENING_SECONDS)
    openings.learn(0.05)
    assert (openings.is_learned, openings.seconds()) == (True, LEAST_SECONDS)
    openings.learn(0.8)
    assert openings.seconds() == 3.2


def test_few_long_silences_do_not_change_bound() -> None:
    assert bound(*[0.25] * 90, *[3.0] * 9) == LEAST_SECONDS


def test_old_silences_are_forgotten() -> None:
    assert bound(*[3.0] * RECENT, *[0.25] * RECENT) == LEAST_SECONDS
