"""A shard in the middle of a chain: results and failures of the next shards reach the steps that they belong to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stitch.errors import Incompatible, Unavailable
from stitch.sampling import Token
from stitch.v1 import shard_pb2
from stitch_server.engine.types import IncomingSegment, SessionFailure, SessionToken, StepOutput, StepReply
from tests.support.engine_fakes import WIDTH, FakeUpstream
from tests.support.next_stage_harness import BLOCKS, NextStageHarness, causes, segment


class TestMiddle:
    """A next stage with next shards."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        return NextStageHarness(last=False)

    def middle(self, session: int, *where: int, neighbour: str = "end", **fields: int) -> IncomingSegment:
        return segment(session, *where, chain=(neighbour,), **fields)  # type: ignore[arg-type]

    def test_step_is_sent_downstream_and_its_reply_upstream(self, harness: NextStageHarness) -> None:
        step = harness.receive(self.middle(5), self.middle(6))
        harness.compute(top_prefill=0.5)
        assert harness.up.replies == []
        sent = harness.downstream.last
        assert [one.session.cached for one in sent.segments] == [4, 4]
        harness.answer(harness.downstream.answer(sent))
        assert harness.up.last.step == step
        assert harness.up.last.tokens == (SessionToken(5, 0, Token(7, 4)), SessionToken(6, 0, Token(7, 4)))

    def test_stages_of_reply_add_up(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.clock.advance(1.0)
        harness.compute(top_prefill=0.5)
        harness.clock.advance(3.0)
        answer = harness.downstream.answer(harness.downstream.last)
        harness.answer(replace(answer, stages={"top_prefill": 0.75, "sample": 0.25}))
        assert harness.up.last.stages == {"queue": 1.0, "top_prefill": 1.25, "sample": 0.25, "wire": 2.0}

    def test_step_is_split_over_two_next_shards(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, neighbour="a"), self.middle(6, neighbour="b"))
        harness.compute()
        (_, to_a), (_, to_b) = harness.downstream.sent
        harness.answer(harness.downstream.answer(to_b, token_id=8))
        assert harness.up.replies == []
        harness.answer(harness.downstream.answer(to_a, token_id=9))
        assert harness.up.last.tokens == (SessionToken(6, 0, Token(8, 4)), SessionToken(5, 0, Token(9, 4)))

    def test_merged_steps_are_answered_separately(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        steps = harness.receive(self.middle(5)), harness.receive(self.middle(5), upstream=other)
        harness.compute()
        assert len(harness.downstream.sent) == 1
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert (harness.up.last.step, other.last.step) == steps
        assert [len(link.last.tokens) for link in (harness.up, other)] == [1, 1]

    def test_token_of_two_chunks_belongs_to_later_step(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(self.middle(5, 4, 8))
        harness.compute()
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert [reply.tokens for reply in harness.up.replies] == [(), (SessionToken(5, 0, Token(7, 12)),)]

    def test_full_window_yields_no_batch(self, harness: NextStageHarness) -> None:
        for session in range(5):
            harness.receive(self.middle(session, 16))
            if session < 4:
                harness.compute()
        assert harness.stage.next_batch() is None
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert harness.stage.next_batch() is not None

    def test_failure_downstream_ends_session_here(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5), self.middle(6))
        harness.compute()
        sent = harness.downstream.last
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, "no block")
        _, token = harness.downstream.answer(sent).tokens
        harness.answer(StepReply(sent.number, (token,), (failure,)))
        assert harness.up.last.failures == (replace(failure, session_id=5),)
        assert [one.session_id for one in harness.up.last.tokens] == [6]
        assert harness.stage.running_sessions == 1

    def test_failure_of_earlier_epoch_spares_session(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        sent = harness.downstream.last
        harness.stage.close(harness.up, [5])
        harness.receive(self.middle(5, epoch=1))
        harness.compute()
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        harness.answer(StepReply(sent.number, failures=(failure,)))
        assert harness.up.last.failures[0].epoch == 0
        assert harness.stage.running_sessions == 1

    def test_refused_session_is_closed_downstream(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        number = harness.downstream.last.segments[0].session.id
        harness.receive(replace(self.middle(5, 1, 4), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "TOO_LONG")]
        assert harness.downstream.closed == [("end", number)]

    def test_withdrawn_session_is_not_opened_downstream(self) -> None:
        harness = NextStageHarness(last=False, max_merged_tokens=10_000)
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        assert sorted(reply.step for reply in harness.up.replies) == [1, 2]
        assert harness.downstream.sent == []
        assert harness.idle

    def test_cause_of_downstream_failure_reaches_upstream(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.compute()
        sent = harness.downstream.last
        harness.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert harness.stage.next_batch() is None
        # Closed there meanwhile, so that the first chunk finds it so.
        failure = SessionFailure(sent.segments[0].session.id, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        harness.answer(StepReply(sent.number, failures=(failure,)))
        assert [causes(reply) for reply in harness.up.replies] == [[(5, "TOO_LONG")]] * 2

    def test_non_finite_chunk_closes_session_opened_by_its_batch(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, 8, wants_token=False))
        harness.receive(self.middle(5, 4, 8))
        batch = harness.compute(non_finite=(1,))
        assert harness.downstream.last.opens == (True,)
        assert harness.downstream.closed == [("end", batch.segments[0].session.id)]
        assert causes(harness.up.last) == [(5, "PRECONDITION")]

    def test_closed_session_is_closed_downstream(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.stage.close(harness.up, [5])
        assert harness.downstream.closed == [("end", harness.downstream.last.segments[0].session.id)]
        assert harness.idle

    def test_end_of_upstream_link_closes_its_sessions_downstream(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5), self.middle(6))
        harness.compute()
        harness.stage.on_upstream_lost(harness.up)
        assert len(harness.downstream.closed) == 2
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert harness.idle

    def test_lost_next_shard_fails_steps_in_flight(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5, neighbour="a"), self.middle(6, neighbour="b"))
        harness.compute()
        harness.stage.on_link_lost("a", Unavailable("a is gone"))
        assert harness.up.replies == []
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert harness.up.last.failures[0].message == "a is gone"
        assert [one.session_id for one in harness.up.last.tokens] == [6]

    def test_refused_link_fails_steps_as_precondition(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.stage.on_link_lost("end", Incompatible("another tokenizer"))
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert harness.up.last.failures[0].message == "another tokenizer"

    def test_lost_next_shard_refuses_next_segments_of_idle_sessions(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.answer(harness.downstream.answer(harness.downstream.last))
        harness.stage.on_link_lost("end", Unavailable("end is gone"))
        harness.receive(self.middle(5, 1, 4))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert harness.idle

    def test_failed_batch_closes_its_sessions_downstream(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.compute()
        harness.receive(self.middle(5, 1, 4))
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        assert causes(harness.up.last) == [(5, "UNAVAILABLE")]
        assert len(harness.downstream.closed) == 1

    def test_batch_of_non_finite_segments_sends_no_step(self, harness: NextStageHarness) -> None:
        harness.receive(self.middle(5))
        harness.stage.deliver(
            harness.next_batch(), StepOutput(hidden=torch.zeros(4, WIDTH), non_finite={0: "hidden states"})
        )
        assert harness.downstream.sent == []
        assert causes(harness.up.last) == [(5, "PRECONDITION")]

    def test_reply_to_unknown_step_is_ignored(self, harness: NextStageHarness) -> None:
        harness.answer(StepReply(99, tokens=(SessionToken(1, 0, Token(7, 4)),)))
        assert harness.up.replies == []
