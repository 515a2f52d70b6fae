"""What a shard sends, to whom, and what it still waits for."""

from __future__ import annotations

import pytest
import torch

from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.session import Request
from stitch_server.engine.types import Batch, LayerRange, Segment, StepOutput
from tests.support.engine_fakes import FakeDownstream, computed, new_session

CUT = LayerRange(0, 4)


def segment(session: Request, position: int = 0, length: int = 2, wants_token: bool = False) -> Segment:
    return Segment(session, CUT, position, length, wants_token, blocks=[0])


def send(
    forwarding: StepsInFlight, *segments: Segment, pipelined: bool = False, non_finite: tuple[int, ...] = ()
) -> list[int]:
    batch = Batch(segments)
    return forwarding.send(batch, computed(batch, non_finite), pipelined)


@pytest.fixture
def downstream() -> FakeDownstream:
    return FakeDownstream()


@pytest.fixture
def forwarding(downstream: FakeDownstream) -> StepsInFlight:
    return StepsInFlight(downstream, window_steps=3)


def test_a_step_holds_the_rows_of_its_segments(downstream: FakeDownstream) -> None:
    forwarding = StepsInFlight(downstream)
    first, second = segment(new_session()), segment(new_session(), length=1)
    rows = torch.arange(12.0).view(3, 4)
    forwarding.send(Batch((first, second)), StepOutput(hidden=rows), pipelined=True)
    address, step = downstream.sent[0]
    assert (address, step.segments, step.pipelined) == ("top:1", (first, second), True)

    assert step.hidden is rows


def test_every_address_has_a_step_of_its_own(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    sessions = [new_session(chain=(address, "end:1")) for address in ("a:1", "b:1", "a:1")]
    rows = [torch.full((2, 4), float(index)) for index in range(3)]
    batch = Batch(tuple(segment(session) for session in sessions))
    numbers = forwarding.send(batch, StepOutput(hidden=torch.cat(rows)), pipelined=False)
    assert [(address, step.number) for address, step in downstream.sent] == [("a:1", numbers[0]), ("b:1", numbers[1])]
    to_a = downstream.sent[0][1]
    assert [one.session for one in to_a.segments] == [sessions[0], sessions[2]]
    assert to_a.hidden.equal(torch.cat([rows[0], rows[2]]))
    assert forwarding.count == 2


def test_only_the_first_segment_opens_a_session(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    one, other = new_session(), new_session()
    send(forwarding, segment(one), segment(one, position=2), segment(other))
    send(forwarding, segment(one, position=4), segment(other, position=2))
    assert [step.opens for _, step in downstream.sent] == [(True, False, True), (False, False)]


def test_a_session_that_begins_anew_opens_anew(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    session = new_session()
    send(forwarding, segment(session))
    session.reset_for_recompute()
    send(forwarding, segment(session))
    assert [step.opens for _, step in downstream.sent] == [(True,), (True,)]


def test_spoilt_segments_stay_here(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    non_finite, sound = new_session(), new_session()
    send(forwarding, segment(non_finite), segment(sound), non_finite=(0,))
    assert [one.session for one in downstream.last.segments] == [sound]
    assert not non_finite.open_downstream


def test_a_batch_of_spoilt_segments_is_no_step(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    assert send(forwarding, segment(new_session()), non_finite=(0,)) == []
    assert (downstream.sent, forwarding.count) == ([], 0)


def test_unanswered_steps_fill_the_window(forwarding: StepsInFlight) -> None:
    numbers = [send(forwarding, segment(new_session()))[0] for _ in range(3)]
    assert forwarding.is_full
    forwarding.settle(numbers[1])
    assert not forwarding.is_full


def test_a_step_is_settled_once(forwarding: StepsInFlight) -> None:
    one = segment(new_session())
    (number,) = send(forwarding, one)
    assert forwarding.settle(number) == (one,)
    assert forwarding.settle(number) == ()
    assert forwarding.settle(99) == ()


def test_a_lost_address_names_its_steps(forwarding: StepsInFlight) -> None:
    mine, other = segment(new_session(chain=("a:1",))), segment(new_session(chain=("b:1",)))
    (number,) = send(forwarding, mine)
    send(forwarding, other)
    assert forwarding.sent_to("a:1") == [(number, (mine,))]
    assert forwarding.sent_to("c:1") == []


def test_the_end_of_a_session_goes_to_its_next_shard(forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
    forwarding.close(("a:1", "b:1"), 5)
    assert downstream.closed == [("a:1", 5)]


class TestOvertaking:
    """A decode step waits for no prompt's frames, but never passes an earlier step of its own sessions."""

    def test_a_decode_step_may(self, forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_session()
        (number,) = send(forwarding, segment(session))
        assert not downstream.last.urgent
        forwarding.settle(number)
        send(forwarding, segment(new_session(), length=100))
        send(forwarding, segment(session, position=2, length=1))
        assert downstream.last.urgent

    def test_the_last_token_of_a_prompt_may_not(self, forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_session()
        send(forwarding, segment(session, length=100))
        send(forwarding, segment(session, position=100, length=1))
        assert not downstream.last.urgent

    def test_a_prompt_of_one_token_may_not(self, forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
        send(forwarding, segment(new_session(), length=1))
        assert not downstream.last.urgent

    def test_a_mixed_step_may_not(self, forwarding: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_session()
        forwarding.settle(send(forwarding, segment(session))[0])
        send(forwarding, segment(session, position=2, length=1), segment(new_session(), length=3))
        assert not downstream.last.urgent
