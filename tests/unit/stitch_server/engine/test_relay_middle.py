"""A shard between two others answers for those behind it, whatever becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stitch.errors import Incompatible, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.session_table import ReceivedSegment
from stitch_server.engine.types import SessionFailure, SessionToken, StepOutput, StepReply, Token
from tests.support.engine_fakes import WIDTH, FakeUpstream
from tests.support.relay_bench import BLOCKS, Bench, causes, segment


class TestMiddle:
    """A shard between two others passes on what it computes, and what it hears."""

    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(last=False)

    def middle(self, session: int, *where: int, address: str = "end:1", **fields: int) -> ReceivedSegment:
        return segment(session, *where, chain=(address,), **fields)  # type: ignore[arg-type]

    def test_a_step_is_passed_on_and_its_answer_back(self, bench: Bench) -> None:
        step = bench.receive(self.middle(5), self.middle(6))
        bench.compute(top_prefill=0.5)
        assert bench.up.replies == []
        sent = bench.downstream.last
        assert [one.session.cached for one in sent.segments] == [4, 4]
        bench.relay.replied(bench.downstream.answer(sent))
        assert bench.up.last.step == step
        assert bench.up.last.tokens == (SessionToken(5, 0, Token(7, 4)), SessionToken(6, 0, Token(7, 4)))

    def test_times_add_up(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.clock.advance(1.0)
        bench.compute(top_prefill=0.5)
        bench.clock.advance(3.0)
        answer = bench.downstream.answer(bench.downstream.last)
        bench.relay.replied(replace(answer, stages={"top_prefill": 0.75, "sample": 0.25}))
        assert bench.up.last.stages == {"queue": 1.0, "top_prefill": 1.25, "sample": 0.25, "wire": 2.0}

    def test_one_step_may_go_to_two_shards(self, bench: Bench) -> None:
        bench.receive(self.middle(5, address="a:1"), self.middle(6, address="b:1"))
        bench.compute()
        (_, to_a), (_, to_b) = bench.downstream.sent
        bench.relay.replied(bench.downstream.answer(to_b, token_id=8))
        assert bench.up.replies == []
        bench.relay.replied(bench.downstream.answer(to_a, token_id=9))
        assert bench.up.last.tokens == (SessionToken(6, 0, Token(8, 4)), SessionToken(5, 0, Token(9, 4)))

    def test_two_steps_that_were_merged_are_answered_apart(self, bench: Bench) -> None:
        other = FakeUpstream()
        steps = bench.receive(self.middle(5)), bench.receive(self.middle(5), upstream=other)
        bench.compute()
        assert len(bench.downstream.sent) == 1
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        assert (bench.up.last.step, other.last.step) == steps
        assert [len(link.last.tokens) for link in (bench.up, other)] == [1, 1]

    def test_the_token_of_two_chunks_belongs_to_the_later(self, bench: Bench) -> None:
        bench.receive(self.middle(5, 8, wants_token=False))
        bench.receive(self.middle(5, 4, 8))
        bench.compute()
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        assert [reply.tokens for reply in bench.up.replies] == [(), (SessionToken(5, 0, Token(7, 12)),)]

    def test_it_takes_no_more_than_the_window(self, bench: Bench) -> None:
        for session in range(5):
            bench.receive(self.middle(session, 16))
            if session < 4:
                bench.compute()
        assert bench.relay.next_batch() is None
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        assert bench.relay.next_batch() is not None

    def test_a_failure_behind_ends_the_session_here(self, bench: Bench) -> None:
        bench.receive(self.middle(5), self.middle(6))
        bench.compute()
        sent = bench.downstream.last
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, "no block")
        bench.relay.replied(StepReply(sent.number, failures=(failure,)))
        assert bench.up.last.failures == (replace(failure, session_id=5),)
        assert bench.relay.running_sessions == 1

    def test_a_late_failure_spares_a_session_that_began_anew(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        sent = bench.downstream.last
        bench.relay.close(bench.up, [5])
        bench.receive(self.middle(5, epoch=1))
        bench.compute()
        number = sent.segments[0].session.id
        failure = SessionFailure(number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.relay.replied(StepReply(sent.number, failures=(failure,)))
        assert bench.up.last.failures[0].epoch == 0
        assert bench.relay.running_sessions == 1

    def test_a_refusal_here_frees_the_session_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        number = bench.downstream.last.segments[0].session.id
        bench.receive(replace(self.middle(5, 1, 4), length=BLOCKS * 16))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "TOO_LONG")]
        assert bench.downstream.closed == [("end:1", number)]

    def test_what_was_taken_back_is_not_opened_behind(self) -> None:
        bench = Bench(last=False, batch_tokens=10_000)
        bench.receive(self.middle(5, 8, wants_token=False))
        bench.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert bench.relay.next_batch() is None
        assert sorted(reply.step for reply in bench.up.replies) == [1, 2]
        assert bench.downstream.sent == []
        assert bench.idle

    def test_a_reason_that_is_told_behind_is_told_before(self, bench: Bench) -> None:
        bench.receive(self.middle(5, 8, wants_token=False))
        bench.compute()
        sent = bench.downstream.last
        bench.receive(replace(self.middle(5, 4, 8), length=BLOCKS * 16))
        assert bench.relay.next_batch() is None
        # Closed there meanwhile, so that the first chunk finds it so.
        failure = SessionFailure(sent.segments[0].session.id, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.relay.replied(StepReply(sent.number, failures=(failure,)))
        assert [causes(reply) for reply in bench.up.replies] == [[(5, "TOO_LONG")]] * 2

    def test_a_spoilt_chunk_closes_what_its_batch_has_opened_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5, 8, wants_token=False))
        bench.receive(self.middle(5, 4, 8))
        batch = bench.compute(non_finite=(1,))
        assert bench.downstream.last.opens == (True,)
        assert bench.downstream.closed == [("end:1", batch.segments[0].session.id)]
        assert causes(bench.up.last) == [(5, "PRECONDITION")]

    def test_a_closed_session_is_closed_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        bench.relay.close(bench.up, [5])
        assert bench.downstream.closed == [("end:1", bench.downstream.last.segments[0].session.id)]
        assert bench.idle

    def test_a_link_that_ended_closes_its_sessions_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5), self.middle(6))
        bench.compute()
        bench.relay.link_closed(bench.up)
        assert len(bench.downstream.closed) == 2
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        assert bench.idle

    def test_a_lost_shard_fails_the_steps_under_way(self, bench: Bench) -> None:
        bench.receive(self.middle(5, address="a:1"), self.middle(6, address="b:1"))
        bench.compute()
        bench.relay.lost("a:1", Unavailable("a:1 is gone"))
        assert bench.up.replies == []
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        assert causes(bench.up.last) == [(5, "UNAVAILABLE")]
        assert bench.up.last.failures[0].message == "a:1 is gone"
        assert [one.session_id for one in bench.up.last.tokens] == [6]

    def test_a_shard_that_refuses_the_link_is_no_shard_that_is_gone(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        bench.relay.lost("end:1", Incompatible("another tokenizer"))
        assert causes(bench.up.last) == [(5, "PRECONDITION")]
        assert bench.up.last.failures[0].message == "another tokenizer"

    def test_a_lost_shard_fails_what_comes_next_of_the_others(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        bench.relay.replied(bench.downstream.answer(bench.downstream.last))
        bench.relay.lost("end:1", Unavailable("end:1 is gone"))
        bench.receive(self.middle(5, 1, 4))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "UNAVAILABLE")]
        assert bench.idle

    def test_a_batch_that_fails_closes_its_sessions_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        bench.receive(self.middle(5, 1, 4))
        bench.relay.fail(bench.compose(), RuntimeError("out of paper"))
        assert causes(bench.up.last) == [(5, "UNAVAILABLE")]
        assert len(bench.downstream.closed) == 1

    def test_a_spoilt_batch_sends_nothing(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.relay.deliver(bench.compose(), StepOutput(hidden=torch.zeros(4, WIDTH), non_finite=frozenset({0})))
        assert bench.downstream.sent == []
        assert causes(bench.up.last) == [(5, "PRECONDITION")]

    def test_an_answer_that_nobody_waits_for_is_ignored(self, bench: Bench) -> None:
        bench.relay.replied(StepReply(99, tokens=(SessionToken(1, 0, Token(7, 4)),)))
        assert bench.up.replies == []
