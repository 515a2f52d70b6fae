"""Tests of ejections: what ejects a replica, for how long, and the session that tries it again."""

from __future__ import annotations

import pytest

from router_gateway.shards.ejection import Ejection, EjectionPolicy


class Bench:
    """An ejection record with a clock of its own, and the causes that it has reported."""

    def __init__(self, **policy: float) -> None:
        self.now = 0.0
        self.causes: list[str | None] = []
        self.record = Ejection("top-0", EjectionPolicy(**policy), lambda: self.now, self.causes.append)  # type: ignore[arg-type]

    def fail(self, sessions: int) -> None:
        for _ in range(sessions):
            self.record.failed("broken")

    def eject(self) -> None:
        self.record.eject("unreachable", "gone")

    def recover(self) -> None:
        """Lets the time of the ejection pass, and a session try the replica."""
        while self.record.avoided:
            self.now += 0.5
        session = object()
        self.record.placed(session)
        self.record.progressed(session)


def test_failures_in_a_row_eject() -> None:
    bench = Bench()
    bench.fail(2)
    assert not bench.record.avoided
    bench.fail(1)
    assert bench.record.avoided
    assert bench.causes == ["failures"]


def test_success_between_failures_ends_their_row() -> None:
    bench = Bench()
    bench.fail(2)
    bench.record.succeeded()
    bench.fail(2)
    assert not bench.record.avoided


def test_half_of_the_latest_sessions_eject() -> None:
    bench = Bench()
    for _ in range(10):
        bench.record.succeeded()
        bench.fail(1)
    assert not bench.record.avoided
    bench.fail(1)
    assert bench.record.avoided


def test_ejection_ends_after_its_time() -> None:
    bench = Bench(first_seconds=2.0)
    bench.eject()
    bench.now = 1.9
    assert bench.record.avoided
    bench.now = 2.0
    assert not bench.record.avoided


def test_each_ejection_soon_after_the_last_takes_twice_as_long() -> None:
    bench = Bench(max_seconds=4.0)
    lengths = []
    for _ in range(4):
        start = bench.now
        bench.eject()
        while bench.record.avoided:
            bench.now += 0.5
        lengths.append(bench.now - start)
    assert lengths == [1.0, 2.0, 4.0, 4.0]
    bench.recover()
    bench.now += 100.0
    start = bench.now
    bench.eject()
    bench.recover()
    assert bench.now - start == 1.0


def test_ejected_replica_is_not_ejected_again() -> None:
    bench = Bench()
    bench.eject()
    bench.eject()
    assert bench.causes == ["unreachable"]


def test_one_session_tries_it_until_its_first_token() -> None:
    bench, session = Bench(), object()
    bench.eject()
    bench.now = 1.0
    bench.record.placed(session)
    assert bench.record.avoided
    bench.record.progressed(object())
    assert bench.record.avoided
    bench.record.progressed(session)
    assert not bench.record.avoided
    assert bench.causes == ["unreachable", None]


def test_trial_that_fails_ejects_at_once() -> None:
    bench, session = Bench(), object()
    bench.eject()
    bench.now = 1.0
    bench.record.placed(session)
    bench.record.left(session)
    bench.fail(1)
    assert bench.causes == ["unreachable", "failures"]
    bench.now = 2.9
    assert bench.record.avoided


def test_trial_that_its_client_ends_leaves_the_next_one() -> None:
    bench, first, second = Bench(), object(), object()
    bench.eject()
    bench.now = 1.0
    bench.record.placed(first)
    bench.record.left(first)
    assert not bench.record.avoided
    bench.record.placed(second)
    bench.record.progressed(second)
    assert bench.causes == ["unreachable", None]


def test_session_that_is_placed_during_the_ejection_is_no_trial() -> None:
    bench, session = Bench(), object()
    bench.eject()
    bench.record.placed(session)
    bench.record.progressed(session)
    assert bench.record.avoided


def test_reason_is_logged_once_for_an_ejection(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.eject()
    bench.eject()
    assert [record.getMessage() for record in caplog.records] == ["shard top-0 gets no new sessions for 1 s: gone"]
