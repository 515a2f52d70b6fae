"""A pass is overdue or stuck by the passes before it; time in which the process doesn't run does not count."""

from __future__ import annotations

import pytest

from stitch_server.engine.watch import (
    OVERDUE_FACTOR,
    OVERDUE_SECONDS,
    STUCK_SECONDS,
    TICK_SECONDS,
    PassWatch,
)
from tests.support.engine_fakes import ManualClock


class WatchHarness:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.watch = PassWatch(self.clock)
        self.watch.tick()

    def run(self, seconds: float) -> None:
        """Lets time pass, tick by tick."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.clock.advance(TICK_SECONDS)
            self.watch.tick()

    def compute(self, seconds: float) -> None:
        """A pass from its beginning to its end."""
        self.watch.begin()
        self.run(seconds)
        self.watch.end()
        self.watch.tick()


@pytest.fixture
def harness() -> WatchHarness:
    return WatchHarness()


def test_idle_engine_is_neither_overdue_nor_stuck(harness: WatchHarness) -> None:
    harness.compute(1.0)
    harness.run(2 * STUCK_SECONDS)
    assert not harness.watch.is_overdue
    assert not harness.watch.is_stuck


def test_pass_becomes_overdue_and_then_stuck(harness: WatchHarness) -> None:
    harness.compute(0.5)
    harness.watch.begin()
    harness.run(OVERDUE_SECONDS)
    assert not harness.watch.is_overdue
    harness.run(1.0)
    assert (harness.watch.is_overdue, harness.watch.is_stuck) == (True, False)
    harness.run(STUCK_SECONDS)
    assert harness.watch.is_stuck


def test_end_of_overdue_pass_clears_it(harness: WatchHarness) -> None:
    harness.compute(0.5)
    harness.compute(OVERDUE_SECONDS + 1)
    assert not harness.watch.is_overdue


def test_bounds_are_learned_from_longest_pass(harness: WatchHarness) -> None:
    harness.compute(4.0)
    harness.watch.begin()
    harness.run(4.0 * OVERDUE_FACTOR)
    assert not harness.watch.is_overdue
    harness.run(1.0)
    assert harness.watch.is_overdue


def test_first_pass_is_never_overdue(harness: WatchHarness) -> None:
    harness.watch.begin()
    harness.run(STUCK_SECONDS)
    assert not harness.watch.is_overdue
    harness.run(1.0)
    assert harness.watch.is_stuck


def test_time_of_a_stopped_process_does_not_count(harness: WatchHarness) -> None:
    harness.compute(0.5)
    harness.watch.begin()
    harness.clock.advance(10 * STUCK_SECONDS)
    harness.watch.tick()
    assert not harness.watch.is_overdue
