"""A reply counts for the sessions of its step, on the link that the step was sent over; strays are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Unavailable
from stitch.sampling import Token
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import SegmentReply, StepsInFlight
from stitch_server.engine.request import Request
from stitch_server.engine.types import Batch, LayerRange, Segment, SessionFailure, SessionToken, StepReply
from tests.support.engine_fakes import FakeDownstream, computed, new_request
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids
from tests.support.next_stage_harness import NextStageHarness, causes, segment

NEAR, FAR = "near", "far"
GONE = shard_pb2.FAILURE_CAUSE_UNAVAILABLE


def failure_of(session: Request, epoch: int = 0) -> SessionFailure:
    return SessionFailure(session.id, epoch, GONE, "no more")


def token_of(session: Request, position: int, epoch: int = 0, token_id: int = 5) -> SessionToken:
    return SessionToken(session.id, epoch, Token(token_id, position))


class TestSettle:
    """Which parts of a reply count."""

    def setup_method(self) -> None:
        self.strays: list[int] = []
        self.downstream = FakeDownstream()
        self.in_flight = StepsInFlight(self.downstream, count_strays=self.strays.append)

    def send(self, *sent: tuple[Request, int, int], wants_token: bool = True) -> int:
        """Sends a step of sessions with positions and lengths; returns its number."""
        segments = tuple(Segment(one, LayerRange(0, 4), *where, wants_token, blocks=[0]) for one, *where in sent)
        batch = Batch(segments)
        return self.in_flight.send(batch, computed(batch), pipelined=False)[0]

    def settle(self, reply: StepReply, neighbour: str = NEAR) -> list[SegmentReply]:
        return self.in_flight.settle(neighbour, reply)

    def test_token_at_next_position_counts(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        (answer,) = self.settle(StepReply(number, tokens=(token_of(session, 7),)))
        assert (answer.segment.session, answer.token, answer.failure) == (session, Token(5, 7), None)
        assert self.strays == []

    def test_reply_over_another_link_settles_nothing(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        reply = StepReply(number, tokens=(token_of(session, 7),), failures=(failure_of(session),))
        assert self.settle(reply, FAR) == []
        assert (self.in_flight.count, self.strays) == (1, [1])
        assert self.settle(reply) != []

    def test_reply_to_unknown_or_answered_step_is_stray(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        self.settle(StepReply(number, tokens=(token_of(session, 7),)))
        for stray in (number, number + 1, 0):
            assert self.settle(StepReply(stray, tokens=(token_of(session, 7),))) == []
        assert self.strays == [1, 1, 1]

    def test_sessions_of_other_steps_are_strays(self) -> None:
        mine, other = new_request(chain=(NEAR,)), new_request(chain=(NEAR,))
        number, later = self.send((mine, 4, 3)), self.send((other, 4, 3))
        tokens, failures = (token_of(other, 7), token_of(mine, 7)), (failure_of(other),)
        (answer,) = self.settle(StepReply(number, tokens, failures))
        assert (answer.segment.session, answer.token) == (mine, Token(5, 7))
        assert self.strays == [2]
        (answer,) = self.settle(StepReply(later, tokens=(token_of(other, 7, token_id=6),)))
        assert answer.token == Token(6, 7)

    @pytest.mark.parametrize("changes", [{"position": 6}, {"position": 8}, {"position": 7, "epoch": 1}])
    def test_token_elsewhere_fails_the_session_without_one(self, changes: dict[str, int]) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        (answer,) = self.settle(StepReply(number, tokens=(token_of(session, **changes),)))
        assert answer.token is None
        assert answer.failure is not None
        assert (answer.failure.cause, answer.failure.shard) == (GONE, NEAR)
        assert answer.failure.message == "near answered a step without token 7 of its session"
        assert self.strays == [1]

    def test_second_token_of_a_segment_is_stray(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        tokens = (token_of(session, 7), token_of(session, 7, token_id=6))
        (answer,) = self.settle(StepReply(number, tokens))
        assert (answer.token, self.strays) == (Token(5, 7), [1])

    def test_token_that_was_not_wanted_is_stray(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3), wants_token=False)
        (answer,) = self.settle(StepReply(number, tokens=(token_of(session, 7),)))
        assert (answer.token, answer.failure, self.strays) == (None, None, [1])

    def test_epoch_is_that_of_the_send(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 4, 3))
        session.reset_for_recompute()
        reply = StepReply(number, (token_of(session, 7, epoch=1),), (failure_of(session, epoch=1), failure_of(session)))
        (answer,) = self.settle(reply)
        assert (answer.epoch, answer.failure) == (0, failure_of(session))
        assert self.strays == [2]

    def test_failure_counts_once_and_leaves_no_token(self) -> None:
        session = new_request(chain=(NEAR,))
        number = self.send((session, 0, 4), (session, 4, 3))
        later = replace(failure_of(session), message="later")
        tokens = (token_of(session, 4), token_of(session, 7))
        first, last = self.settle(StepReply(number, tokens, (failure_of(session), later)))
        assert (first.failure, last.failure, last.token) == (None, failure_of(session), None)
        assert self.strays == []

    def test_lost_shard_is_one_of_the_chain(self) -> None:
        session = new_request(chain=(NEAR, FAR))
        number = self.send((session, 4, 3))
        failures = (replace(failure_of(session), shard="another"),)
        assert self.settle(StepReply(number, failures=failures))[0].failure == failure_of(session)
        number = self.send((session, 7, 1))
        failures = (replace(failure_of(session), shard=FAR),)
        assert self.settle(StepReply(number, failures=failures))[0].failure == failures[0]


class TestFirstStage:
    """Of a request, beside replies that are not for it."""

    def test_stray_token_reaches_no_client(self) -> None:
        harness = FirstStageHarness()
        victim, outputs = harness.admit(chain=(NEAR,), max_tokens=2)
        sent = harness.compute()
        forged = StepReply(sent.number, tokens=(token_of(victim, 20, token_id=66),))
        harness.stage.on_reply(FAR, forged)
        harness.stage.on_reply(NEAR, replace(forged, step=sent.number + 1))
        assert outputs == []
        harness.reply(sent)
        assert token_ids(outputs) == [7]

    def test_stray_failure_ends_no_request(self) -> None:
        harness = FirstStageHarness()
        victim, outputs = harness.admit(chain=(NEAR,), max_tokens=2)
        sent = harness.compute()
        harness.stage.on_reply(FAR, StepReply(sent.number, failures=(failure_of(victim),)))
        harness.reply(sent)
        assert token_ids(outputs) == [7]

    def test_reply_to_step_of_lost_link_is_stray(self) -> None:
        harness = FirstStageHarness()
        _, outputs = harness.admit(chain=(NEAR,))
        sent = harness.compute()
        harness.stage.on_link_lost(NEAR, Unavailable("gone"))
        harness.reply(sent)
        assert str(error_of(outputs)) == "gone"
        assert harness.idle

    def test_answer_without_token_ends_the_request(self) -> None:
        harness = FirstStageHarness()
        _, outputs = harness.admit(chain=(NEAR,))
        harness.answer(StepReply(harness.compute().number))
        error = error_of(outputs)
        assert isinstance(error, Unavailable)
        assert (error.shard, str(error)) == (NEAR, "near answered a step without token 20 of its session")
        assert harness.idle


class TestMiddle:
    """Of a shard in the middle of the chain."""

    def test_replies_of_another_next_shard_do_not_resolve_a_step(self) -> None:
        harness = NextStageHarness(last=False)
        harness.receive(segment(5, chain=(NEAR,)))
        harness.compute()
        sent = harness.downstream.last
        harness.clock.advance(1.0)
        harness.stage.on_reply(FAR, StepReply(sent.number, failures=(SessionFailure(5, 0, GONE, "no more"),)))
        assert (harness.up.replies, harness.stage.running_sessions) == ([], 1)
        harness.answer(harness.downstream.answer(sent))
        assert harness.up.last.tokens == (SessionToken(5, 0, Token(7, 4)),)
        assert harness.up.last.stages["wire"] == 1.0

    def test_session_without_token_fails_upstream(self) -> None:
        harness = NextStageHarness(last=False)
        harness.receive(segment(5, chain=(NEAR,)))
        harness.compute()
        harness.answer(StepReply(harness.downstream.last.number))
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert harness.up.last.failures[0].shard == NEAR
        assert harness.idle
