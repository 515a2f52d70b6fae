"""A next shard that answers nothing holds back its own sessions alone: each has a window, and nobody waits for it."""

from __future__ import annotations

import pytest

from stitch.errors import Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import LATE_FACTOR, LATE_SECONDS, MAX_UNANSWERED_STEPS, WINDOW_STEPS, StepsInFlight
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.types import Batch, IncomingSegment, LayerRange, Segment, SessionFailure, StepReply
from tests.support.engine_fakes import FakeDownstream, ManualClock, computed, new_request
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids
from tests.support.next_stage_harness import NextStageHarness, causes, segment

SILENT, SOUND = "silent", "sound"
LATER = LATE_SECONDS * 1.1


class TestWindows:
    """Of the steps in flight."""

    def setup_method(self) -> None:
        self.clock, self.downstream = ManualClock(), FakeDownstream()
        self.in_flight = StepsInFlight(self.downstream, clock=self.clock)

    def send(self, session: Request, position: int = 0) -> int:
        batch = Batch((Segment(session, LayerRange(0, 4), position, 2, wants_token=True, blocks=[0]),))
        return self.in_flight.send(batch, computed(batch), pipelined=False)[0]

    def settle(self, number: int) -> None:
        self.in_flight.settle(self.downstream.receiver_of(number), StepReply(number))

    def fill(self, neighbour: str, steps: int = WINDOW_STEPS) -> list[Request]:
        """Sends steps of as many sessions."""
        sessions = [new_request(chain=(neighbour,)) for _ in range(steps)]
        for session in sessions:
            self.send(session)
        return sessions

    def test_full_window_of_one_next_shard_leaves_room_on_others(self) -> None:
        self.fill(SILENT)
        assert not self.in_flight.has_room([SILENT])
        assert self.in_flight.has_room([SOUND])
        assert not self.in_flight.has_room([SOUND, SILENT])

    def test_steps_of_ended_sessions_leave_window(self) -> None:
        ended = self.fill(SILENT)[0]
        self.in_flight.close_session(ended)
        assert self.in_flight.has_room([SILENT])
        assert self.in_flight.count == WINDOW_STEPS
        self.fill(SILENT, 1)
        assert not self.in_flight.has_room([SILENT])

    def test_step_leaves_window_when_last_of_its_sessions_ends(self) -> None:
        one, other = new_request(chain=(SILENT,)), new_request(chain=(SILENT,))
        segments = tuple(Segment(who, LayerRange(0, 4), 0, 2, wants_token=True, blocks=[0]) for who in (one, other))
        batch = Batch(segments)
        self.in_flight.send(batch, computed(batch), pipelined=False)
        self.fill(SILENT, WINDOW_STEPS - 1)
        self.in_flight.close_session(one)
        assert not self.in_flight.has_room([SILENT])
        self.in_flight.close_session(other)
        assert self.in_flight.has_room([SILENT])

    def test_next_shard_keeps_limited_steps_of_ended_sessions(self) -> None:
        for _ in range(MAX_UNANSWERED_STEPS):
            assert self.in_flight.has_room([SILENT])
            self.in_flight.close_session(self.fill(SILENT, 1)[0])
        assert not self.in_flight.has_room([SILENT])

    def test_age_is_since_last_answer_of_next_shard(self) -> None:
        first, second = new_request(chain=(SILENT,)), new_request(chain=(SILENT,))
        number = self.send(first)
        self.clock.advance(1.0)
        self.send(second)
        assert self.in_flight.age_seconds == 1.0
        self.clock.advance(1.0)
        self.settle(number)
        self.clock.advance(0.5)
        assert self.in_flight.age_seconds == 0.5

    def test_nothing_in_flight_has_no_age(self) -> None:
        number = self.send(new_request(chain=(SILENT,)))
        self.clock.advance(1.0)
        self.settle(number)
        self.clock.advance(1.0)
        assert (self.in_flight.age_seconds, self.in_flight.is_late([SILENT])) == (0.0, False)

    def test_next_shard_without_answer_becomes_late(self) -> None:
        self.send(new_request(chain=(SILENT,)))
        self.clock.advance(LATE_SECONDS)
        assert not self.in_flight.is_late([SILENT])
        self.clock.advance(LATER - LATE_SECONDS)
        assert self.in_flight.is_late([SILENT])
        assert not self.in_flight.is_late([SOUND])

    def test_lateness_is_learned_from_replies_of_others(self) -> None:
        number = self.send(new_request(chain=(SOUND,)))
        self.clock.advance(3.0)
        self.settle(number)
        self.send(new_request(chain=(SILENT,)))
        self.clock.advance(3.0 * LATE_FACTOR)
        assert not self.in_flight.is_late([SILENT])
        self.clock.advance(0.1)
        assert self.in_flight.is_late([SILENT])

    def test_doubted_next_shard_is_late_with_any_step(self) -> None:
        self.downstream.doubted.add(SILENT)
        assert not self.in_flight.is_late([SILENT])
        self.send(new_request(chain=(SILENT,)))
        self.clock.advance(0.01)
        assert self.in_flight.is_late([SILENT])
        assert not self.in_flight.is_late([SOUND])

    @pytest.mark.parametrize("kind", ["suspects", "doubted"])
    def test_silent_next_shard_gets_no_new_session(self, kind: str) -> None:
        assert self.in_flight.refusal([SOUND, SILENT]) is None
        getattr(self.downstream, kind).add(SILENT)
        refusal = self.in_flight.refusal([SOUND, SILENT])
        assert refusal is not None
        assert refusal.shard == SILENT
        assert self.in_flight.refusal([SOUND]) is None

    def test_lost_steps_of_suspect_teach_nothing(self) -> None:
        number = self.send(new_request(chain=(SILENT,)))
        self.clock.advance(60.0)
        self.downstream.suspects.add(SILENT)
        self.settle(number)
        self.send(new_request(chain=(SOUND,)))
        self.clock.advance(LATER)
        assert self.in_flight.is_late([SOUND])


@pytest.mark.parametrize("num_micro_batches", [1, 2])
class TestFirstStage:
    """Sessions of a sound next shard beside those of a silent one."""

    def decode(self, harness: FirstStageHarness, steps: int) -> None:
        """Computes passes, and answers the sound next shard's steps alone."""
        for _ in range(steps):
            harness.compute()
            self.answer_sound(harness)

    def answer_sound(self, harness: FirstStageHarness) -> None:
        for neighbour, step in list(harness.downstream.sent):
            if neighbour == SOUND:
                harness.reply(step)
                harness.downstream.sent.remove((neighbour, step))

    def beside_silent(self, num_micro_batches: int) -> tuple[FirstStageHarness, list[RequestOutput]]:
        """A harness with two sessions that have their first tokens, and the outputs of the sound one."""
        harness = FirstStageHarness(num_micro_batches=num_micro_batches, max_num_batched_tokens=64)
        harness.admit(chain=(SILENT,))
        _, outputs = harness.admit(chain=(SOUND,), first_token=100)
        harness.compute()
        for _, step in harness.downstream.sent:
            harness.reply(step)
        harness.downstream.sent.clear()
        while (batch := harness.stage.next_batch()) is not None:
            harness.stage.deliver(batch, computed(batch))
        self.answer_sound(harness)
        harness.clock.advance(LATER)
        return harness, outputs

    def test_decoding_goes_on(self, num_micro_batches: int) -> None:
        harness, outputs = self.beside_silent(num_micro_batches)
        self.decode(harness, steps=8)
        assert len(token_ids(outputs)) >= 9

    def test_newcomer_of_sound_shard_is_admitted(self, num_micro_batches: int) -> None:
        harness, _ = self.beside_silent(num_micro_batches)
        harness.admit(chain=(SILENT,), first_token=200)
        _, outputs = harness.admit(chain=(SOUND,), first_token=300)
        self.decode(harness, steps=3)
        assert len(token_ids(outputs)) >= 2

    def test_suspect_ends_its_sessions_and_its_waiting_ones(self, num_micro_batches: int) -> None:
        harness, sound = self.beside_silent(num_micro_batches)
        _, waiting = harness.admit(chain=(SILENT,), first_token=200)
        harness.downstream.suspects.add(SILENT)
        harness.stage.on_link_lost(SILENT, Unavailable("no answer", shard=SILENT))
        error = error_of(waiting)
        assert isinstance(error, Unavailable)
        assert (error.shard, error.generated_tokens) == (SILENT, 0)
        assert all(one.error is None for one in sound)
        assert (harness.stage.running_sessions, harness.stage.waiting_sessions) == (1, 0)

    def test_suspect_gets_no_new_session(self, num_micro_batches: int) -> None:
        harness = FirstStageHarness(num_micro_batches=num_micro_batches)
        harness.downstream.suspects.add(SILENT)
        _, outputs = harness.admit(chain=(SILENT,))
        error = error_of(outputs)
        assert isinstance(error, Unavailable)
        assert error.shard == SILENT
        _, undecided = harness.admit(chain=(), candidates={"weak": (SOUND,), "strong": (SILENT,)})
        assert isinstance(error_of(undecided), Unavailable)
        assert harness.idle


def test_failure_downstream_names_shard() -> None:
    harness = FirstStageHarness()
    request, outputs = harness.admit(chain=("top-0", "top-1"))
    cause = shard_pb2.FAILURE_CAUSE_UNAVAILABLE
    failure = SessionFailure(request.id, 0, cause, "it is silent", "top-0")
    harness.answer(StepReply(harness.compute().number, failures=(failure,)))
    error = error_of(outputs)
    assert isinstance(error, Unavailable)
    assert (error.shard, str(error)) == ("top-0", "it is silent")


class TestMiddle:
    """A next stage between one upstream shard and two next shards."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        harness = NextStageHarness(last=False)
        for session in range(WINDOW_STEPS):
            harness.receive(self.segment(session, SILENT))
            harness.compute()
        return harness

    def segment(self, session: int, *chain: str, position: int = 0) -> IncomingSegment:
        return segment(session, 1, position, chain=chain)

    def test_steps_of_other_next_shards_pass(self, harness: NextStageHarness) -> None:
        harness.receive(self.segment(90, SILENT))
        harness.receive(self.segment(91, SOUND))
        batch = harness.compute()
        assert [one.session.next_shards for one in batch.segments] == [(SOUND,)]
        assert harness.stage.next_batch() is None

    def test_held_step_follows_when_there_is_room(self, harness: NextStageHarness) -> None:
        harness.receive(self.segment(90, SILENT))
        assert harness.stage.next_batch() is None
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert [one.session.next_shards for one in harness.compute().segments] == [(SILENT,)]

    def test_steps_of_one_session_keep_their_order(self, harness: NextStageHarness) -> None:
        harness.receive(self.segment(90, SOUND), self.segment(91, SILENT))
        harness.receive(self.segment(90, position=1))
        harness.receive(self.segment(92, SOUND))
        assert len(harness.compute().segments) == 1
        assert harness.stage.next_batch() is None
        harness.answer(harness.downstream.answer(harness.downstream.sent[0][1]))
        assert [(one.position, one.length) for one in harness.compute().segments] == [(0, 1), (0, 1), (1, 1)]

    def test_suspect_refuses_new_sessions_by_name(self, harness: NextStageHarness) -> None:
        harness.downstream.suspects.add(SILENT)
        harness.stage.on_link_lost(SILENT, Unavailable("no answer", shard=SILENT))
        assert {failure.shard for reply in harness.up.replies for failure in reply.failures} == {SILENT}
        harness.receive(self.segment(90, SILENT))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(90, "UNAVAILABLE")]
        assert harness.up.last.failures[0].shard == SILENT
