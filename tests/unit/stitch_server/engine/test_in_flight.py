"""The steps that a pass is split into, and which of them are in flight."""

from __future__ import annotations

import pytest
import torch

from stitch_server.engine.in_flight import SegmentReply, StepsInFlight
from stitch_server.engine.request import Request
from stitch_server.engine.types import Batch, LayerRange, Segment, StepOutput, StepReply
from tests.support.engine_fakes import FakeDownstream, computed, new_request

LAYERS = LayerRange(0, 4)


def segment(session: Request, position: int = 0, length: int = 2, wants_token: bool = False) -> Segment:
    return Segment(session, LAYERS, position, length, wants_token, blocks=[0])


def send(
    in_flight: StepsInFlight, *segments: Segment, pipelined: bool = False, non_finite: tuple[int, ...] = ()
) -> list[int]:
    batch = Batch(segments)
    return in_flight.send(batch, computed(batch, non_finite), pipelined)


def settle(in_flight: StepsInFlight, number: int) -> list[SegmentReply]:
    """Settles a step by an empty reply."""
    return in_flight.settle("top-0", StepReply(number))


@pytest.fixture
def downstream() -> FakeDownstream:
    return FakeDownstream()


@pytest.fixture
def in_flight(downstream: FakeDownstream) -> StepsInFlight:
    return StepsInFlight(downstream, window_steps=3)


def test_step_holds_rows_of_its_segments(downstream: FakeDownstream) -> None:
    in_flight = StepsInFlight(downstream)
    first, second = segment(new_request()), segment(new_request(), length=1)
    rows = torch.arange(12.0).view(3, 4)
    in_flight.send(Batch((first, second)), StepOutput(hidden=rows), pipelined=True)
    neighbour, step = downstream.sent[0]
    assert (neighbour, step.segments, step.pipelined) == ("top-0", (first, second), True)

    assert step.hidden is rows


def test_pass_is_split_into_one_step_per_neighbour(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    sessions = [new_request(chain=(neighbour, "end")) for neighbour in ("a", "b", "a")]
    rows = [torch.full((2, 4), float(index)) for index in range(3)]
    batch = Batch(tuple(segment(session) for session in sessions))
    numbers = in_flight.send(batch, StepOutput(hidden=torch.cat(rows)), pipelined=False)
    assert [(neighbour, step.number) for neighbour, step in downstream.sent] == [("a", numbers[0]), ("b", numbers[1])]
    to_a = downstream.sent[0][1]
    assert [one.session for one in to_a.segments] == [sessions[0], sessions[2]]
    assert to_a.hidden.equal(torch.cat([rows[0], rows[2]]))
    assert in_flight.count == 2


def test_only_first_segment_opens_session(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    one, other = new_request(), new_request()
    send(in_flight, segment(one), segment(one, position=2), segment(other))
    send(in_flight, segment(one, position=4), segment(other, position=2))
    assert [step.opens for _, step in downstream.sent] == [(True, False, True), (False, False)]


def test_preempted_session_is_opened_again(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    session = new_request()
    send(in_flight, segment(session))
    session.reset_for_recompute()
    send(in_flight, segment(session))
    assert [step.opens for _, step in downstream.sent] == [(True,), (True,)]


def test_non_finite_segment_is_not_sent(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    non_finite, sound = new_request(), new_request()
    send(in_flight, segment(non_finite), segment(sound), non_finite=(0,))
    assert [one.session for one in downstream.last.segments] == [sound]
    assert not non_finite.open_downstream


def test_pass_of_non_finite_segments_sends_no_step(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    assert send(in_flight, segment(new_request()), non_finite=(0,)) == []
    assert (downstream.sent, in_flight.count) == ([], 0)


def test_window_is_full_until_a_step_is_settled(in_flight: StepsInFlight) -> None:
    numbers = [send(in_flight, segment(new_request()))[0] for _ in range(3)]
    assert not in_flight.has_room(["top-0"])
    settle(in_flight, numbers[1])
    assert in_flight.has_room(["top-0"])


def test_step_is_settled_once(in_flight: StepsInFlight) -> None:
    one = segment(new_request())
    (number,) = send(in_flight, one)
    assert settle(in_flight, number) == [SegmentReply(one, 0, None, None)]
    assert settle(in_flight, number) == []
    assert settle(in_flight, 99) == []


def test_sent_to_returns_unanswered_steps_of_neighbour(in_flight: StepsInFlight) -> None:
    mine, other = segment(new_request(chain=("a",))), segment(new_request(chain=("b",)))
    (number,) = send(in_flight, mine)
    send(in_flight, other)
    assert in_flight.sent_to("a") == [(number, (mine,))]
    assert in_flight.sent_to("c") == []


def test_open_session_is_closed_on_its_next_shard(in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
    session = new_request(chain=("a", "b"))
    in_flight.close_session(session)
    assert downstream.closed == []
    send(in_flight, segment(session))
    in_flight.close_session(session)
    assert downstream.closed == [("a", session.id)]


class TestOvertaking:
    """A decode step may overtake the frames of prompts, but no earlier step of its own sessions."""

    def test_decode_step_is_urgent(self, in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_request()
        (number,) = send(in_flight, segment(session))
        assert not downstream.last.urgent
        settle(in_flight, number)
        send(in_flight, segment(new_request(), length=100))
        send(in_flight, segment(session, position=2, length=1))
        assert downstream.last.urgent

    def test_last_token_of_prompt_is_not_urgent(self, in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_request()
        send(in_flight, segment(session, length=100))
        send(in_flight, segment(session, position=100, length=1))
        assert not downstream.last.urgent

    def test_prompt_of_one_token_is_not_urgent(self, in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
        send(in_flight, segment(new_request(), length=1))
        assert not downstream.last.urgent

    def test_step_with_prefill_is_not_urgent(self, in_flight: StepsInFlight, downstream: FakeDownstream) -> None:
        session = new_request()
        settle(in_flight, send(in_flight, segment(session))[0])
        send(in_flight, segment(session, position=2, length=1), segment(new_request(), length=3))
        assert not downstream.last.urgent
