"""Steps of several links share a batch, and the chain's last shard answers every one exactly once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Unavailable
from stitch_server.engine.types import SessionToken, StepReply, Token
from tests.support.engine_fakes import FakeUpstream
from tests.support.relay_bench import BLOCKS, CUTS, Bench, causes, segment


class TestLast:
    """The chain's last shard answers by itself."""

    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(last=True)

    def test_nothing_waits_at_first(self, bench: Bench) -> None:
        assert bench.relay.next_batch() is None
        assert (bench.relay.running_sessions, bench.relay.waiting_sessions) == (0, 0)

    def test_a_step_is_computed_and_answered(self, bench: Bench) -> None:
        step = bench.receive(segment(5), segment(6, wants_token=False))
        batch = bench.compute(top_prefill=0.5)
        assert [one.length for one in batch.segments] == [4, 4]
        assert bench.up.last.step == step
        assert bench.up.last.tokens == (SessionToken(5, 0, Token(7, 4)),)
        assert bench.up.last.stages == {"queue": 0.0, "top_prefill": 0.5}
        assert bench.relay.running_sessions == 2

    def test_a_segment_has_the_rows_that_were_sent_for_it(self, bench: Bench) -> None:
        bench.receive(segment(5, 3, route="strong"), segment(6, 2))
        batch = bench.compose()
        assert [one.layers for one in batch.segments] == [CUTS["weak"], CUTS["strong"]]
        rows = [one.hidden for one in batch.segments]
        assert [None if one is None else one[:, 0].tolist() for one in rows] == [[0.0, 1.0], [0.0, 1.0, 2.0]]

    def test_steps_that_wait_are_merged(self, bench: Bench) -> None:
        other = FakeUpstream()
        first, second = bench.receive(segment(5)), bench.receive(segment(5), upstream=other)
        bench.clock.advance(2.0)
        batch = bench.compute()
        assert batch.num_tokens == 8
        assert [reply.step for reply in bench.up.replies + other.replies] == [first, second]
        assert bench.up.last.stages["queue"] == pytest.approx(2.0)

    def test_a_batch_ends_where_it_would_be_too_large(self, bench: Bench) -> None:
        for session in (5, 6, 7):
            bench.receive(segment(session, 8))
        assert [bench.compute().num_tokens, bench.compute().num_tokens] == [16, 8]
        assert bench.relay.next_batch() is None

    def test_one_large_step_is_computed_whole(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.receive(segment(6, 1))
        assert bench.compute().num_tokens == 40

    def test_two_chunks_of_a_session_keep_their_order(self, bench: Bench) -> None:
        bench.receive(segment(5, 8, wants_token=False))
        bench.receive(segment(5, 4, position=8))
        assert [one.position for one in bench.compute().segments] == [0, 8]
        assert [len(reply.tokens) for reply in bench.up.replies] == [0, 1]

    def test_it_is_pipelined_where_any_step_is(self, bench: Bench) -> None:
        bench.receive(segment(5, 1))
        bench.receive(segment(6, 1), pipelined=True)
        assert bench.compute().pipelined
        bench.receive(segment(7, 1))
        assert not bench.compute().pipelined

    def test_a_sampled_token_becomes_part_of_the_sequence(self, bench: Bench) -> None:
        bench.receive(segment(5))
        sequence = bench.compute().segments[0].session
        assert sequence.token_ids == [*range(40), 7]

    def test_computed_beginnings_are_shared(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.compute()
        bench.receive(segment(6, 8, position=32, reused=32))
        bench.compute()
        assert bench.up.last.tokens == (SessionToken(6, 0, Token(7, 40)),)

    def test_a_refused_segment_disturbs_no_other(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6, 2, position=3), segment(7))
        batch = bench.compute()
        assert [one.hidden[:, 0].tolist() for one in batch.segments if one.hidden is not None] == [[0, 1, 2, 3]] * 2
        assert [one.session_id for one in bench.up.last.tokens] == [5, 7]
        assert causes(bench.up.last) == [(6, "PRECONDITION")]

    def test_a_step_of_refused_segments_is_answered_at_once(self, bench: Bench) -> None:
        step = bench.receive(segment(5, position=3), segment(6, route="medium"))
        assert bench.relay.next_batch() is None
        assert bench.up.last.step == step
        assert causes(bench.up.last) == [(5, "PRECONDITION"), (6, "PRECONDITION")]
        assert bench.idle

    def test_behind_a_step_that_is_refused_others_go_on(self, bench: Bench) -> None:
        bench.receive(segment(5, position=3))
        bench.receive(segment(6))
        assert bench.compute().num_tokens == 4
        assert len(bench.up.replies) == 2

    def test_without_room_a_session_is_told_so(self, bench: Bench) -> None:
        bench.receive(replace(segment(5), length=BLOCKS * 16 + 1))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "TOO_LONG")]
        assert bench.idle

    def test_without_room_for_its_second_chunk_the_first_is_taken_back(self) -> None:
        bench, other = Bench(last=True, batch_tokens=10_000), FakeUpstream()
        bench.receive(segment(5, 40, wants_token=False), segment(6))
        bench.receive(replace(segment(5, position=40), length=BLOCKS * 16))
        bench.receive(segment(5, 32), upstream=other)
        batch = bench.compute()
        # Nobody computes into blocks that are another's now.
        blocks = [block for one in batch.segments for block in one.blocks]
        assert len(set(blocks)) == len(blocks)
        assert [one.length for one in batch.segments] == [4, 32]
        assert [reply.step for reply in bench.up.replies] == [2, 1]
        assert [causes(reply) for reply in bench.up.replies] == [[(5, "TOO_LONG")]] * 2
        assert len(other.last.tokens) == 1
        assert bench.relay.running_sessions == 2

    def test_a_beginning_that_is_gone_is_told(self, bench: Bench) -> None:
        bench.receive(segment(5, position=32, reused=32))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "PREFIX_MISSING")]

    def test_a_closed_session_is_freed(self, bench: Bench) -> None:
        bench.receive(segment(5))
        bench.compute()
        bench.relay.close(bench.up, [5, 99])
        assert bench.idle

    def test_a_session_that_was_closed_while_it_waited_is_not_opened(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6))
        bench.relay.close(bench.up, [5])
        bench.compute()
        assert causes(bench.up.last) == [(5, "PRECONDITION")]
        assert bench.relay.running_sessions == 1

    def test_the_same_session_of_another_link_is(self, bench: Bench) -> None:
        bench.receive(segment(5), upstream=FakeUpstream())
        bench.relay.close(bench.up, [5])
        bench.compute()
        assert bench.relay.running_sessions == 1

    def test_after_its_end_a_session_may_begin_anew(self, bench: Bench) -> None:
        bench.receive(segment(5))
        bench.relay.close(bench.up, [5])
        bench.receive(segment(5, epoch=1))
        bench.compute()
        assert bench.up.replies[0].failures
        assert bench.up.replies[1].tokens == (SessionToken(5, 1, Token(7, 4)),)

    def test_a_link_that_ended_leaves_nothing(self, bench: Bench) -> None:
        other = FakeUpstream()
        bench.receive(segment(5))
        bench.compute()
        bench.receive(segment(5, 1, position=4))
        bench.receive(segment(6), upstream=other)
        bench.relay.link_closed(bench.up)
        assert bench.compute().num_tokens == 4
        assert len(bench.up.replies) == 1
        assert len(other.replies) == 1
        bench.relay.link_closed(other)
        assert bench.idle

    def test_a_spoilt_segment_ends_its_session_alone(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6))
        bench.compute(non_finite=(0,))
        assert causes(bench.up.last) == [(5, "PRECONDITION")]
        assert "session 5 at position 0 are not finite" in bench.up.last.failures[0].message
        assert [one.session_id for one in bench.up.last.tokens] == [6]
        assert bench.relay.running_sessions == 1

    def test_what_follows_a_spoilt_chunk_is_answered_too(self, bench: Bench) -> None:
        bench.receive(segment(5, 8, wants_token=False))
        bench.receive(segment(5, 4, position=8))
        bench.compute(non_finite=(0,))
        assert [reply.step for reply in bench.up.replies] == [1, 2]
        assert causes(bench.up.replies[0]) == [(5, "PRECONDITION")]
        assert bench.idle

    def test_spoilt_tokens_are_not_shared(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.compute(non_finite=(0,))
        bench.receive(segment(6, 8, position=32, reused=32))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(6, "PREFIX_MISSING")]

    def test_a_batch_that_fails_ends_its_sessions(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6, position=9))
        bench.relay.fail(bench.compose(), RuntimeError("out of paper"))
        assert causes(bench.up.last) == [(6, "PRECONDITION"), (5, "UNAVAILABLE")]
        assert "out of paper" in bench.up.last.failures[1].message
        assert bench.idle

    def test_it_waits_for_nobody(self, bench: Bench) -> None:
        bench.relay.replied(StepReply(1))
        bench.relay.lost("end:1", Unavailable("gone"))
        assert bench.up.replies == []
