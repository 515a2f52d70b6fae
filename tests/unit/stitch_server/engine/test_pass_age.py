"""A pass is overdue or stuck by the passes before it; time in which the process doesn't run does not count."""

from __future__ import annotations

import pytest

from stitch_server.engine.pass_age import (
    OVERDUE_FACTOR,
    OVERDUE_SECONDS,
    STUCK_SECONDS,
    TICK_SECONDS,
    PassAge,
)
from tests.support.engine_fakes import ManualClock


class PassAgeHarness:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pass_age = PassAge(self.clock)
        self.pass_age.tick()

    def run(self, seconds: float) -> None:
        """Lets time pass, tick by tick."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.clock.advance(TICK_SECONDS)
            self.pass_age.tick()

    def compute(self, seconds: float) -> None:
        """A pass from its beginning to its end."""
        self.pass_age.begin()
        self.run(seconds)
        self.pass_age.end()
        self.pass_age.tick()


@pytest.fixture
def harness() -> PassAgeHarness:
    return PassAgeHarness()


def test_idle_engine_is_neither_overdue_nor_stuck(harness: PassAgeHarness) -> None:
    harness.compute(1.0)
    harness.run(2 * STUCK_SECONDS)
    assert not harness.pass_age.is_overdue
    assert not harness.pass_age.is_stuck


def test_pass_becomes_overdue_and_then_stuck(harness: PassAgeHarness) -> None:
    harness.compute(0.5)
    harness.pass_age.begin()
    harness.run(OVERDUE_SECONDS)
    assert not harness.pass_age.is_overdue
    harness.run(1.0)
    assert (harness.pass_age.is_overdue, harness.pass_age.is_stuck) == (True, False)
    harness.run(STUCK_SECONDS)
    assert harness.pass_age.is_stuck


def test_end_of_overdue_pass_clears_it(harness: PassAgeHarness) -> None:
    harness.compute(0.5)
    harness.compute(OVERDUE_SECONDS + 1)
    assert not harness.pass_age.is_overdue


def test_bounds_are_learned_from_longest_pass(harness: PassAgeHarness) -> None:
    harness.compute(4.0)
    harness.pass_age.begin()
    harness.run(4.0 * OVERDUE_FACTOR)
    assert not harness.pass_age.is_overdue
    harness.run(1.0)
    assert harness.pass_age.is_overdue


def test_first_pass_is_never_overdue(harness: PassAgeHarness) -> None:
    harness.pass_age.begin()
    harness.run(STUCK_SECONDS)
    assert not harness.pass_age.is_overdue
    harness.run(1.0)
    assert harness.pass_age.is_stuck


def test_time_of_a_stopped_process_does_not_count(harness: PassAgeHarness) -> None:
    harness.compute(0.5)
    harness.pass_age.begin()
    harness.clock.advance(10 * STUCK_SECONDS)
    harness.pass_age.tick()
    assert not harness.pass_age.is_overdue
