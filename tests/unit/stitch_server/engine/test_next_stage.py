"""Steps of several links share a batch, and the chain's last shard answers every one exactly once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Unavailable
from stitch_server.engine.types import SessionToken, StepReply, Token
from tests.support.engine_fakes import FakeUpstream
from tests.support.next_stage_harness import BLOCKS, LAYER_RANGES, NextStageHarness, causes, segment


class TestLast:
    """The chain's last shard answers by itself."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        return NextStageHarness(last=True)

    def test_nothing_waits_at_first(self, harness: NextStageHarness) -> None:
        assert harness.stage.next_batch() is None
        assert (harness.stage.running_sessions, harness.stage.waiting_sessions) == (0, 0)

    def test_a_step_is_computed_and_answered(self, harness: NextStageHarness) -> None:
        step = harness.receive(segment(5), segment(6, wants_token=False))
        batch = harness.compute(top_prefill=0.5)
        assert [one.length for one in batch.segments] == [4, 4]
        assert harness.up.last.step == step
        assert harness.up.last.tokens == (SessionToken(5, 0, Token(7, 4)),)
        assert harness.up.last.stages == {"queue": 0.0, "top_prefill": 0.5}
        assert harness.stage.running_sessions == 2

    def test_a_segment_has_the_rows_that_were_sent_for_it(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 3, route="strong"), segment(6, 2))
        batch = harness.next_batch()
        assert [one.layers for one in batch.segments] == [LAYER_RANGES["weak"], LAYER_RANGES["strong"]]
        rows = [one.hidden for one in batch.segments]
        assert [None if one is None else one[:, 0].tolist() for one in rows] == [[0.0, 1.0], [0.0, 1.0, 2.0]]

    def test_steps_that_wait_are_merged(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        first, second = harness.receive(segment(5)), harness.receive(segment(5), upstream=other)
        harness.clock.advance(2.0)
        batch = harness.compute()
        assert batch.num_tokens == 8
        assert [reply.step for reply in harness.up.replies + other.replies] == [first, second]
        assert harness.up.last.stages["queue"] == pytest.approx(2.0)

    def test_a_batch_ends_where_it_would_be_too_large(self, harness: NextStageHarness) -> None:
        for session in (5, 6, 7):
            harness.receive(segment(session, 8))
        assert [harness.compute().num_tokens, harness.compute().num_tokens] == [16, 8]
        assert harness.stage.next_batch() is None

    def test_one_large_step_is_computed_whole(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.receive(segment(6, 1))
        assert harness.compute().num_tokens == 40

    def test_two_chunks_of_a_session_keep_their_order(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 8, wants_token=False))
        harness.receive(segment(5, 4, position=8))
        assert [one.position for one in harness.compute().segments] == [0, 8]
        assert [len(reply.tokens) for reply in harness.up.replies] == [0, 1]

    def test_it_is_pipelined_where_any_step_is(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 1))
        harness.receive(segment(6, 1), pipelined=True)
        assert harness.compute().pipelined
        harness.receive(segment(7, 1))
        assert not harness.compute().pipelined

    def test_a_sampled_token_becomes_part_of_the_sequence(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        sequence = harness.compute().segments[0].session
        assert sequence.token_ids == [*range(40), 7]

    def test_computed_beginnings_are_shared(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.compute()
        harness.receive(segment(6, 8, position=32, reused=32))
        harness.compute()
        assert harness.up.last.tokens == (SessionToken(6, 0, Token(7, 40)),)

    def test_a_refused_segment_disturbs_no_other(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6, 2, position=3), segment(7))
        batch = harness.compute()
        assert [one.hidden[:, 0].tolist() for one in batch.segments if one.hidden is not None] == [[0, 1, 2, 3]] * 2
        assert [one.session_id for one in harness.up.last.tokens] == [5, 7]
        assert causes(harness.up.last) == [(6, "PRECONDITION")]

    def test_a_step_of_refused_segments_is_answered_at_once(self, harness: NextStageHarness) -> None:
        step = harness.receive(segment(5, position=3), segment(6, route="medium"))
        assert harness.stage.next_batch() is None
        assert harness.up.last.step == step
        assert causes(harness.up.last) == [(5, "PRECONDITION"), (6, "PRECONDITION")]
        assert harness.idle

    def test_behind_a_step_that_is_refused_others_go_on(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, position=3))
        harness.receive(segment(6))
        assert harness.compute().num_tokens == 4
        assert len(harness.up.replies) == 2

    def test_without_room_a_session_is_told_so(self, harness: NextStageHarness) -> None:
        harness.receive(replace(segment(5), length=BLOCKS * 16 + 1))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "TOO_LONG")]
        assert harness.idle

    def test_without_room_for_its_second_chunk_the_first_is_taken_back(self) -> None:
        harness, other = NextStageHarness(last=True, max_merged_tokens=10_000), FakeUpstream()
        harness.receive(segment(5, 40, wants_token=False), segment(6))
        harness.receive(replace(segment(5, position=40), length=BLOCKS * 16))
        harness.receive(segment(5, 32), upstream=other)
        batch = harness.compute()
        # Nobody computes into blocks that are another's now.
        blocks = [block for one in batch.segments for block in one.blocks]
        assert len(set(blocks)) == len(blocks)
        assert [one.length for one in batch.segments] == [4, 32]
        assert [reply.step for reply in harness.up.replies] == [2, 1]
        assert [causes(reply) for reply in harness.up.replies] == [[(5, "TOO_LONG")]] * 2
        assert len(other.last.tokens) == 1
        assert harness.stage.running_sessions == 2

    def test_a_beginning_that_is_gone_is_told(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, position=32, reused=32))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "PREFIX_MISSING")]

    def test_a_closed_session_is_freed(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        harness.compute()
        harness.stage.close(harness.up, [5, 99])
        assert harness.idle

    def test_a_session_that_was_closed_while_it_waited_is_not_opened(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6))
        harness.stage.close(harness.up, [5])
        harness.compute()
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert harness.stage.running_sessions == 1

    def test_the_same_session_of_another_link_is(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), upstream=FakeUpstream())
        harness.stage.close(harness.up, [5])
        harness.compute()
        assert harness.stage.running_sessions == 1

    def test_after_its_end_a_session_may_begin_anew(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        harness.stage.close(harness.up, [5])
        harness.receive(segment(5, epoch=1))
        harness.compute()
        assert harness.up.replies[0].failures
        assert harness.up.replies[1].tokens == (SessionToken(5, 1, Token(7, 4)),)

    def test_a_link_that_ended_leaves_nothing(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        harness.receive(segment(5))
        harness.compute()
        harness.receive(segment(5, 1, position=4))
        harness.receive(segment(6), upstream=other)
        harness.stage.on_upstream_lost(harness.up)
        assert harness.compute().num_tokens == 4
        assert len(harness.up.replies) == 1
        assert len(other.replies) == 1
        harness.stage.on_upstream_lost(other)
        assert harness.idle

    def test_a_spoilt_segment_ends_its_session_alone(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6))
        harness.compute(non_finite=(0,))
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert "session 5 at position 0 are not finite" in harness.up.last.failures[0].message
        assert [one.session_id for one in harness.up.last.tokens] == [6]
        assert harness.stage.running_sessions == 1

    def test_what_follows_a_spoilt_chunk_is_answered_too(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 8, wants_token=False))
        harness.receive(segment(5, 4, position=8))
        harness.compute(non_finite=(0,))
        assert [reply.step for reply in harness.up.replies] == [1, 2]
        assert causes(harness.up.replies[0]) == [(5, "PRECONDITION")]
        assert harness.idle

    def test_spoilt_tokens_are_not_shared(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.compute(non_finite=(0,))
        harness.receive(segment(6, 8, position=32, reused=32))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(6, "PREFIX_MISSING")]

    def test_a_batch_that_fails_ends_its_sessions(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6, position=9))
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        assert causes(harness.up.last) == [(6, "PRECONDITION"), (5, "UNAVAILABLE")]
        assert "out of paper" in harness.up.last.failures[1].message
        assert harness.idle

    def test_it_waits_for_nobody(self, harness: NextStageHarness) -> None:
        harness.stage.on_reply(StepReply(1))
        harness.stage.on_link_lost("end:1", Unavailable("gone"))
        assert harness.up.replies == []
