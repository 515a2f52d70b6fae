"""Which waiting request is admitted next, and when a refused client should retry."""

from __future__ import annotations

import math

import pytest

from stitch.errors import Exhausted
from stitch_server.engine.request import Request
from stitch_server.engine.waiting import MAX_RETRY_SECONDS, WaitingRequests
from tests.support.engine_fakes import ManualClock, new_request


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def waiting(clock: ManualClock) -> WaitingRequests:
    return WaitingRequests(4, clock)


def add(waiting: WaitingRequests, **fields: object) -> Request:
    request = new_request(**fields)  # type: ignore[arg-type]
    waiting.add(request)
    return request


def next_of(waiting: WaitingRequests, full: str = "") -> Request | None:
    """The next request, while one next shard has no room."""
    return waiting.next(math.inf, lambda request: full not in request.next_shards)


class TestOrder:
    def test_replayed_answer_is_first(self, waiting: WaitingRequests) -> None:
        add(waiting)
        replayed = add(waiting, tokens=9, prompt_tokens=5)
        assert next_of(waiting) is replayed

    def test_replayed_answer_is_not_refused(self, waiting: WaitingRequests) -> None:
        for _ in range(4):
            add(waiting)
        with pytest.raises(Exhausted):
            add(waiting)
        add(waiting, tokens=9, prompt_tokens=5)
        assert len(waiting) == 5

    def test_preempted_request_without_room_holds_up_its_next_shard(self, waiting: WaitingRequests) -> None:
        preempted, other = new_request(), add(waiting, chain=("top-9",))
        add(waiting)
        waiting.put_back(preempted)
        assert next_of(waiting, full="top-0") is other
        waiting.take(other)
        assert next_of(waiting, full="top-0") is None
        assert next_of(waiting) is preempted

    def test_full_next_shard_holds_up_its_own_requests_alone(self, waiting: WaitingRequests) -> None:
        add(waiting, chain=("top-0",))
        other = add(waiting, chain=("top-9",))
        assert next_of(waiting, full="top-0") is other

    def test_request_awaiting_its_route_needs_room_on_all_candidates(self, waiting: WaitingRequests) -> None:
        undecided = add(waiting, chain=(), candidates={"weak": ("top-0",), "strong": ("mid-0", "top-0")})
        assert undecided.next_shards == ("top-0", "mid-0")
        assert next_of(waiting, full="mid-0") is None
        assert next_of(waiting) is undecided

    def test_earliest_deadline_is_first_within_a_tenant(self, waiting: WaitingRequests, clock: ManualClock) -> None:
        add(waiting)
        add(waiting, deadline=clock.now + 20.0)
        urgent = add(waiting, deadline=clock.now + 5.0)
        assert next_of(waiting) is urgent

    def test_turn_after_the_limit_is_not_taken(self, waiting: WaitingRequests) -> None:
        request = add(waiting, tenant="acme")
        waiting.charge(request, 10.0)
        assert waiting.next(10.0, lambda request: True) is None
        assert waiting.next(10.1, lambda request: True) is request


class TestDeadlines:
    def test_expired_requests_leave_the_queue(self, waiting: WaitingRequests, clock: ManualClock) -> None:
        late = add(waiting, deadline=clock.now + 5.0)
        patient = add(waiting)
        clock.advance(5.0)
        assert waiting.pop_expired() == [late]
        assert list(waiting) == [patient]


class TestRetryTime:
    def refusal(self, waiting: WaitingRequests) -> float:
        with pytest.raises(Exhausted) as caught:
            add(waiting)
        return caught.value.retry_after_seconds

    def admit(self, waiting: WaitingRequests) -> None:
        request = next_of(waiting)
        assert request is not None
        waiting.take(request)

    def test_refused_clients_are_told_times_at_the_rate_of_admissions(
        self, waiting: WaitingRequests, clock: ManualClock
    ) -> None:
        for _ in range(4):
            add(waiting)
        for _ in range(4):
            self.admit(waiting)
            add(waiting)
            clock.advance(0.5)
        assert [self.refusal(waiting) for _ in range(3)] == pytest.approx([0.5, 1.0, 1.5])

    def test_every_client_that_returns_when_told_finds_a_place(
        self, waiting: WaitingRequests, clock: ManualClock
    ) -> None:
        for _ in range(4):
            add(waiting)
        for _ in range(4):
            self.admit(waiting)
            add(waiting)
            clock.advance(0.5)
        start = clock.now
        returns = [start + self.refusal(waiting) for _ in range(20)]
        for at in returns:
            while clock.now < at - 1e-9:
                clock.advance(0.25)
                if (clock.now - start) % 0.5 == 0:
                    self.admit(waiting)
            add(waiting)

    def test_retry_time_is_bounded(self, waiting: WaitingRequests) -> None:
        for _ in range(4):
            add(waiting)
        assert max(self.refusal(waiting) for _ in range(200)) == MAX_RETRY_SECONDS
