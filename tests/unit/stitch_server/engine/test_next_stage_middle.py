"""A shard between two others answers for those behind it, whatever becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stitch.errors import Incompatible, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.next_stage import IncomingSegment
from stitch_server.engine.types import SessionFailure, SessionToken, StepOutput, StepReply, Token
from tests.support.engine_fakes import WIDTH, FakeUpstream
from tests.support.next_stage_harness import BLOCKS, NextStageHarness, causes, segment


class TestMiddle:
    """A shard between two others passes on what it computes, and what it hears."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        return NextStageHarness(last=False)

    def middle(self, session: int, *where: int, address: str = "end:1", **fields: int) -> IncomingSegment:
        return segment(session, *where, chain=(address,), **fields)  # type: ignore[arg-type]

    def test_a_step_is_passed_on_and_its_answer_back(self, harness: NextStageHarness) -> None:
        step = harness.receive(self.middle(5), self.middle(6))
        harness.compute(top_prefill=0.5)
        assert harness.up.replies == []
        sent = harness.downstream.last
        assert [one.session.cached for one in sent.segments] == [4, 4]
        harness.stage.on_reply(harness.downstream.answer(sent))
        assert harness.up.last.step == step
        assert harness.up.last.tokens == (SessionToken(5, 0, Token(7, 4)), SessionToken(6, 0, Token(7, 4)))

    def test_times_add_up(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.clock.advance(1.0)
        harness.compute(top_prefill=0.5)
        harness.clock.advance(3.0)
        answer = harness.downstream.answer(harness.downstream.last)
        harness.stage.on_reply(replace(answer, stages={"top_prefill": 0.75, "sample": 0.25}))
        assert harness.up.last.stages == {"queue": 1.0, "top_prefill": 1.25, "sample": 0.25, "wire": 2.0}

    def test_one_step_may_go_to_two_shards(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, address="a:1"), self.middle(6, address="b:1"))
        harness.compute()
        (_, to_a), (_, to_b) = harness.downstream.sent
        harness.stage.on_reply(harness.downstream.answer(to_b, token_id=8))
        assert harness.up.replies == []
        harness.stage.on_reply(harness.downstream.answer(to_a, token_id=9))
        assert harness.up.last.tokens == (SessionToken(6, 0, Token(8, 4)), SessionToken(5, 0, Token(9, 4)))

    def test_two_steps_that_were_merged_are_answered_apart(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        steps = harness.receive(self.middle(5)), harness.receive(self.middle(5), upstream=other)
        harness.compute()
        assert len(harness.downstream.sent) == 1
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        assert (harness.up.last.step, other.last.step) == steps
        assert [len(link.last.tokens) for link in (harness.up, other)] == [1, 1]

    def test_the_token_of_two_chunks_belongs_to_the_later(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(self.middle(5, 4, 8))
        harness.compute()
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        assert [reply.tokens for reply in harness.up.replies] == [(), (SessionToken(5, 0, Token(7, 12)),)]

    def test_it_takes_no_more_than_the_window(self, harness: NextStageHarness) -> None:
        for session in range(5):
            harness.receive(self.middle(session, 16))
            if session < 4:
                harness.compute()
        assert harness.stage.next_batch() is None
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        assert harness.stage.next_batch() is not None

    def test_a_failure_behind_ends_the_session_here(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5), self.middle(6))
        harness.compute()
        sent = harness.downstream.last
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, "no block")
        harness.stage.on_reply(StepReply(sent.number, failures=(failure,)))
        assert harness.up.last.failures == (replace(failure, session_id=5),)
        assert harness.stage.running_sessions == 1

    def test_a_late_failure_spares_a_session_that_began_anew(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        sent = harness.downstream.last
        harness.stage.close(harness.up, [5])
        harness.receive(self.middle(5, epoch=1))
        harness.compute()
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        harness.stage.on_reply(StepReply(sent.number, failures=(failure,)))
        assert harness.up.last.failures[0].epoch == 0
        assert harness.stage.running_sessions == 1

    def test_a_refusal_here_frees_the_session_behind(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        number = harness.downstream.last.segments[0].session.id
        harness.receive(replace(self.middle(5, 1, 4), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "TOO_LONG")]
        assert harness.downstream.closed == [("end:1", number)]

    def test_what_was_taken_back_is_not_opened_behind(self) -> None:
        harness = NextStageHarness(last=False, max_merged_tokens=10_000)
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        assert sorted(reply.step for reply in harness.up.replies) == [1, 2]
        assert harness.downstream.sent == []
        assert harness.idle

    def test_a_reason_that_is_told_behind_is_told_before(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.compute()
        sent = harness.downstream.last
        harness.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        # Closed there meanwhile, so that the first chunk finds it so.
        failure = SessionFailure(sent.segments[0].session.id, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        harness.stage.on_reply(StepReply(sent.number, failures=(failure,)))
        assert [causes(reply) for reply in harness.up.replies] == [[(5, "TOO_LONG")]] * 2

    def test_a_spoilt_chunk_closes_what_its_batch_has_opened_behind(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(self.middle(5, 4, 8))
        batch = harness.compute(non_finite=(1,))
        assert harness.downstream.last.opens == (True,)
        assert harness.downstream.closed == [("end:1", batch.segments[0].session.id)]
        assert causes(harness.up.last) == [(5, "PRECONDITION")]

    def test_a_closed_session_is_closed_behind(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.stage.close(harness.up, [5])
        assert harness.downstream.closed == [("end:1", harness.downstream.last.segments[0].session.id)]
        assert harness.idle

    def test_a_link_that_ended_closes_its_sessions_behind(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5), self.middle(6))
        harness.compute()
        harness.stage.on_upstream_lost(harness.up)
        assert len(harness.downstream.closed) == 2
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        assert harness.idle

    def test_a_lost_shard_fails_the_steps_under_way(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, address="a:1"), self.middle(6, address="b:1"))
        harness.compute()
        harness.stage.on_link_lost("a:1", Unavailable("a:1 is gone"))
        assert harness.up.replies == []
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert harness.up.last.failures[0].message == "a:1 is gone"
        assert [one.session_id for one in harness.up.last.tokens] == [6]

    def test_a_shard_that_refuses_the_link_is_no_shard_that_is_gone(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.stage.on_link_lost("end:1", Incompatible("another tokenizer"))
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert harness.up.last.failures[0].message == "another tokenizer"

    def test_a_lost_shard_fails_what_comes_next_of_the_others(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.stage.on_reply(harness.downstream.answer(harness.downstream.last))
        harness.stage.on_link_lost("end:1", Unavailable("end:1 is gone"))
        harness.receive(self.middle(5, 1, 4))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert harness.idle

    def test_a_batch_that_fails_closes_its_sessions_behind(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.receive(self.middle(5, 1, 4))
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert len(harness.downstream.closed) == 1

    def test_a_spoilt_batch_sends_nothing(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.stage.deliver(harness.next_batch(), StepOutput(hidden=torch.zeros(4, WIDTH), non_finite=frozenset({0})))
        assert harness.downstream.sent == []
        assert causes(harness.up.last) == [(5, "PRECONDITION")]

    def test_an_answer_that_nobody_waits_for_is_ignored(self, harness: NextStageHarness) -> None:
        harness.stage.on_reply(StepReply(99, tokens=(SessionToken(1, 0, Token(7, 4)),)))
        assert harness.up.replies == []
