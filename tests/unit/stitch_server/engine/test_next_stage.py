"""The chain's last shard: steps of several links share a batch, and each step is answered exactly once."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from stitch.errors import Unavailable
from stitch.sampling import Token
from stitch_server.engine.types import SessionToken, StepReply
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import FakeUpstream, sampled
from tests.support.next_stage_harness import BLOCKS, LAYER_RANGES, NextStageHarness, causes, segment


class TestLast:
    """A next stage without next shards."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        return NextStageHarness(last=True)

    def test_next_stage_without_steps_yields_no_batch(self, harness: NextStageHarness) -> None:
        assert harness.stage.next_batch() is None
        assert (harness.stage.running_sessions, harness.stage.waiting_sessions) == (0, 0)

    def test_step_is_computed_and_answered(self, harness: NextStageHarness) -> None:
        step = harness.receive(segment(5), segment(6, wants_token=False))
        batch = harness.compute(top_prefill=0.5)
        assert [one.length for one in batch.segments] == [4, 4]
        assert harness.up.last.step == step
        assert harness.up.last.tokens == (SessionToken(5, 0, Token(7, 4)),)
        assert harness.up.last.stages == {"queue": 0.0, "top_prefill": 0.5}
        assert harness.stage.running_sessions == 2

    def test_segment_holds_its_rows(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 3, route="strong"), segment(6, 2))
        batch = harness.next_batch()
        assert [one.layers for one in batch.segments] == [LAYER_RANGES["weak"], LAYER_RANGES["strong"]]
        rows = [one.hidden for one in batch.segments]
        assert [None if one is None else one[:, 0].tolist() for one in rows] == [[0.0, 1.0], [0.0, 1.0, 2.0]]

    def test_waiting_steps_are_merged(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        first, second = harness.receive(segment(5)), harness.receive(segment(5), upstream=other)
        harness.clock.advance(2.0)
        batch = harness.compute()
        assert batch.num_tokens == 8
        assert [reply.step for reply in harness.up.replies + other.replies] == [first, second]
        assert harness.up.last.stages["queue"] == pytest.approx(2.0)

    def test_merged_steps_keep_below_max_merged_tokens(self, harness: NextStageHarness) -> None:
        for session in (5, 6, 7):
            harness.receive(segment(session, 8))
        assert [harness.compute().num_tokens, harness.compute().num_tokens] == [16, 8]
        assert harness.stage.next_batch() is None

    def test_step_above_max_merged_tokens_is_computed_whole(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.receive(segment(6, 1))
        assert harness.compute().num_tokens == 40

    def test_chunks_of_session_keep_their_order(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 8, wants_token=False))
        harness.receive(segment(5, 4, position=8))
        assert [one.position for one in harness.compute().segments] == [0, 8]
        assert [len(reply.tokens) for reply in harness.up.replies] == [0, 1]

    def test_batch_is_pipelined_if_any_step_is(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 1))
        harness.receive(segment(6, 1), pipelined=True)
        assert harness.compute().pipelined
        harness.receive(segment(7, 1))
        assert not harness.compute().pipelined

    def test_sampled_token_is_appended_to_session(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        sequence = harness.compute().segments[0].session
        assert sequence.token_ids == [*range(40), 7]

    def test_computed_prefix_is_shared(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.compute()
        harness.receive(segment(6, 8, position=32, reused=32))
        harness.compute()
        assert harness.up.last.tokens == (SessionToken(6, 0, Token(7, 40)),)

    def test_refused_segment_spares_other_segments(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6, 2, position=3), segment(7))
        batch = harness.compute()
        assert [one.hidden[:, 0].tolist() for one in batch.segments if one.hidden is not None] == [[0, 1, 2, 3]] * 2
        assert [one.session_id for one in harness.up.last.tokens] == [5, 7]
        assert causes(harness.up.last) == [(6, "PRECONDITION")]

    def test_step_of_refused_segments_is_answered_at_once(self, harness: NextStageHarness) -> None:
        step = harness.receive(segment(5, position=3), segment(6, route="medium"))
        assert harness.stage.next_batch() is None
        assert harness.up.last.step == step
        assert causes(harness.up.last) == [(5, "PRECONDITION"), (6, "PRECONDITION")]
        assert harness.idle

    def test_step_after_refused_one_is_computed(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, position=3))
        harness.receive(segment(6))
        assert harness.compute().num_tokens == 4
        assert len(harness.up.replies) == 2

    def test_segment_without_free_block_fails_as_kv_exhausted(self, harness: NextStageHarness) -> None:
        harness.receive(replace(segment(5), length=BLOCKS * 16 + 1))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "TOO_LONG")]
        assert harness.idle

    def test_refused_second_chunk_withdraws_first_chunk(self) -> None:
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

    def test_missing_prefix_fails_session(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, position=32, reused=32))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(5, "PREFIX_MISSING")]

    def test_closed_session_is_freed(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        harness.compute()
        harness.stage.close(harness.up, [5, 99])
        assert harness.idle

    def test_session_closed_while_queued_is_not_opened(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6))
        harness.stage.close(harness.up, [5])
        harness.compute()
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert harness.stage.running_sessions == 1

    def test_close_spares_session_id_of_another_link(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), upstream=FakeUpstream())
        harness.stage.close(harness.up, [5])
        harness.compute()
        assert harness.stage.running_sessions == 1

    def test_closed_session_may_reopen_in_later_epoch(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5))
        harness.stage.close(harness.up, [5])
        harness.receive(segment(5, epoch=1))
        harness.compute()
        assert harness.up.replies[0].failures
        assert harness.up.replies[1].tokens == (SessionToken(5, 1, Token(7, 4)),)

    def test_end_of_link_frees_its_sessions(self, harness: NextStageHarness) -> None:
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

    def test_non_finite_segment_fails_its_session_alone(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6))
        harness.compute(non_finite=(0,))
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert "session 5 at position 0 are not finite" in harness.up.last.failures[0].message
        assert [one.session_id for one in harness.up.last.tokens] == [6]
        assert harness.stage.running_sessions == 1

    def test_session_without_finite_logits_fails_alone(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6))
        batch = harness.next_batch()
        harness.stage.deliver(batch, replace(sampled(batch, [1]), non_finite={1: "logits"}))
        assert causes(harness.up.last) == [(6, "PRECONDITION")]
        assert harness.up.last.failures[0].message == "logits of session 6 at position 0 are not finite"
        assert [one.session_id for one in harness.up.last.tokens] == [5]

    def test_session_opened_twice_in_a_batch_is_computed_once(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(5, 8), segment(6))
        batch = harness.compute()
        assert [one.length for one in batch.segments] == [8, 4]
        assert causes(harness.up.last) == [(5, "PRECONDITION")]
        assert [one.session_id for one in harness.up.last.tokens] == [5, 6]
        assert harness.stage.running_sessions == 2

    def test_chunk_after_non_finite_one_is_answered(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 8, wants_token=False))
        harness.receive(segment(5, 4, position=8))
        harness.compute(non_finite=(0,))
        assert [reply.step for reply in harness.up.replies] == [1, 2]
        assert causes(harness.up.replies[0]) == [(5, "PRECONDITION")]
        assert harness.idle

    def test_non_finite_prefix_is_not_shared(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5, 40))
        harness.compute(non_finite=(0,))
        harness.receive(segment(6, 8, position=32, reused=32))
        assert harness.stage.next_batch() is None
        assert causes(harness.up.last) == [(6, "PREFIX_MISSING")]

    def test_failed_batch_fails_its_sessions(self, harness: NextStageHarness) -> None:
        harness.receive(segment(5), segment(6, position=9))
        harness.stage.fail(harness.next_batch(), RuntimeError("out of paper"))
        assert causes(harness.up.last) == [(6, "PRECONDITION"), (5, "UNAVAILABLE")]
        assert "out of paper" in harness.up.last.failures[1].message
        assert harness.idle

    def test_next_stage_has_no_waiting_sessions(self, harness: NextStageHarness) -> None:
        harness.stage.on_reply("end", StepReply(1))
        harness.stage.on_link_lost("end", Unavailable("gone"))
        assert harness.up.replies == []


class TestTurns:
    """Links take turns: the steps of one do not hold up those of another."""

    @pytest.fixture
    def harness(self) -> NextStageHarness:
        return NextStageHarness(last=True)

    def test_link_waits_for_one_step_of_each_other_link(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        for session in range(1, 4):
            harness.receive(segment(session, 16))
        harness.receive(segment(9, 1), upstream=other)
        harness.compute()
        assert (len(harness.up.replies), other.replies) == (1, [])
        assert harness.compute().num_tokens == 1
        assert (len(harness.up.replies), len(other.replies)) == (1, 1)
        harness.receive(segment(9, 1, position=1), upstream=other)
        harness.compute()
        harness.compute()
        assert (len(harness.up.replies), len(other.replies)) == (2, 2)

    def test_small_steps_of_all_links_share_a_batch(self, harness: NextStageHarness) -> None:
        others = [FakeUpstream() for _ in range(3)]
        for session in range(1, 5):
            harness.receive(segment(session, 2))
        for other in others:
            harness.receive(segment(1, 2), upstream=other)
        assert harness.compute().num_tokens == 14
        assert [len(one.replies) for one in (harness.up, *others)] == [4, 1, 1, 1]

    def test_steps_of_a_link_keep_their_order(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        steps = [harness.receive(segment(5, 8, position), upstream=harness.up) for position in (0, 8, 16, 24)]
        harness.receive(segment(5, 16), upstream=other)
        while len(harness.up.replies) < 4:
            harness.compute()
        assert [reply.step for reply in harness.up.replies] == steps
        assert len(other.replies) == 1

    def test_ended_link_leaves_the_turns(self, harness: NextStageHarness) -> None:
        other = FakeUpstream()
        harness.receive(segment(5, 16))
        harness.receive(segment(5, 16))
        harness.receive(segment(5, 16), upstream=other)
        harness.stage.on_upstream_lost(harness.up)
        harness.compute()
        assert (harness.up.replies, len(other.replies)) == ([], 1)
        assert harness.stage.next_batch() is None


@pytest.mark.parametrize("seed", range(20))
def test_no_two_sessions_write_one_block(seed: int) -> None:
    """Whatever links open, repeat, close and continue, a block that a pass writes belongs to one session alone."""
    draw, harness = Random(seed), NextStageHarness(last=True, max_merged_tokens=64)
    links = [FakeUpstream(prefix_scope=scope) for scope in ("a", "a", "b")]
    position: dict[tuple[int, int], int] = {}
    for _ in range(300):
        link = draw.randrange(3)
        sent = []
        for _ in range(draw.randint(1, 4)):
            session, length = draw.randint(1, 4), draw.choice((1, 8, 16, 17, 33))
            opens = draw.random() < 0.4
            start = draw.choice((0, 0, 16, 32)) if opens else position.get((link, session), 0)
            sent.append(segment(session, length, start, reused=start if opens else -1, epoch=draw.choice((0, 0, 0, 1))))
            position[link, session] = start + length
        harness.receive(*sent, upstream=links[link])
        if draw.random() < 0.2:
            harness.stage.close(links[link], [draw.randint(1, 4)])
        if draw.random() < 0.02:
            harness.stage.on_upstream_lost(links[link])
        if draw.random() < 0.5 and (batch := harness.stage.next_batch()) is not None:
            written: dict[int, object] = {}
            for one in batch.segments:
                assert list(one.blocks) == harness.pool.blocks_of(one.session.id)
                end = one.position + one.length
                for block in one.blocks[one.position // BLOCK_TOKENS : -(-end // BLOCK_TOKENS)]:
                    assert written.setdefault(block, one.session) is one.session
                    assert harness.pool._holders[block] == 1
            harness.stage.deliver(batch, sampled(batch, [0] if draw.random() < 0.1 else []))
    for link_of in links:
        harness.stage.on_upstream_lost(link_of)
    assert harness.idle
