"""Tests of promises: who redeems them and when, and how much room is kept for them."""

from __future__ import annotations

import pytest

from router_gateway.admission.promises import (
    EARLY_SECONDS,
    GRACE_SECONDS,
    LEAST_RETURN_SHARE,
    MAX_PROMISES,
    Promise,
    Promises,
)


@pytest.fixture
def promises() -> Promises:
    return Promises()


def promise(at: float, digest: bytes = b"a", seconds: float = 4.0) -> Promise:
    return Promise(at, digest, seconds, tokens=10.0)


def test_equal_request_redeems_from_shortly_before_its_time(promises: Promises) -> None:
    promises.add("blue", promise(10.0))
    assert promises.redeem("blue", b"a", 10.0 - EARLY_SECONDS - 0.1) is None
    assert promises.redeem("blue", b"b", 10.0) is None
    assert promises.redeem("red", b"a", 10.0) is None
    assert promises.redeem("blue", b"a", 10.0 - EARLY_SECONDS) == promise(10.0)
    assert promises.redeem("blue", b"a", 10.0) is None
    assert len(promises) == promises.seconds("blue") == promises.tokens("blue") == 0


def test_equal_requests_have_a_promise_each(promises: Promises) -> None:
    for at in (12.0, 10.0, 11.0):
        promises.add("blue", promise(at))
    found = [promises.redeem("blue", b"a", at) for at in (10.0, 11.0, 12.0, 13.0)]
    assert found == [promise(10.0), promise(11.0), promise(12.0), None]


def test_promise_lapses_some_seconds_after_its_time(promises: Promises) -> None:
    promises.add("blue", promise(10.0))
    assert promises.lapse(10.0 + GRACE_SECONDS) == 0
    assert promises.lapse(10.1 + GRACE_SECONDS) == 1
    assert promises.redeem("blue", b"a", 16.0) is None


def test_room_shrinks_to_the_share_that_returns(promises: Promises) -> None:
    for index in range(500):
        promises.add("blue", promise(float(index), bytes([index % 256])))
        promises.lapse(index + GRACE_SECONDS + 1)
    assert promises.return_share == LEAST_RETURN_SHARE
    promises.add("blue", promise(1000.0))
    assert promises.seconds("blue") == pytest.approx(4.0 * LEAST_RETURN_SHARE)
    for index in range(500):
        promises.add("blue", promise(2000.0 + index))
        promises.redeem("blue", b"a", 2000.0 + index)
    assert promises.return_share > 0.95


def test_seconds_due_are_those_until_a_time(promises: Promises) -> None:
    for at in (10.0, 11.0, 12.0):
        promises.add("blue", promise(at))
    assert promises.seconds_due("blue", 11.5) == 8.0
    assert promises.seconds_due("red", 20.0) == 0.0


def test_next_gap_spaces_promises_by_their_rate(promises: Promises) -> None:
    # 8 seconds on shards for each second: two promises a second.
    times = []
    for _ in range(20):
        at = promises.next_gap("blue", 100.0, 4.0, rate=8.0)
        promises.add("blue", promise(at))
        times.append(at)
    assert times == sorted(times)
    for begin in times:
        assert len([at for at in times if begin <= at < begin + 1]) <= 2
    assert times[-1] < 112


def test_gap_for_a_long_request_is_not_searched(promises: Promises) -> None:
    for index in range(1_000):
        promises.add("blue", promise(100.0 + index, seconds=400.0))
    assert promises.next_gap("blue", 1_200.0, 400.0, rate=0.1) == 1_200.0


def test_redeemed_promise_gives_its_room_to_another(promises: Promises) -> None:
    for index in range(2):
        promises.add("blue", promise(100.0, bytes([index])))
    assert promises.next_gap("blue", 100.0, 4.0, rate=8.0) > 100.0
    promises.redeem("blue", bytes([0]), 100.0)
    assert promises.next_gap("blue", 100.0, 4.0, rate=8.0) == 100.0


def test_number_of_a_tenants_promises_is_bounded(promises: Promises) -> None:
    for index in range(MAX_PROMISES + 5):
        promises.add("blue", promise(float(index)))
    promises.add("red", promise(1.0))
    assert len(promises) == MAX_PROMISES + 1
