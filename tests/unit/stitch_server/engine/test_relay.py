"""Steps of several links share a batch, and every one is answered exactly once, whatever becomes of its segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from stitch.errors import Unavailable
from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch_server.cache.pool import BlockPool
from stitch_server.engine.batch import Batch, Cut, StepOutput, Token
from stitch_server.engine.forwarding import Failure, Forwarding, Reply
from stitch_server.engine.intake import Intake, Opening, ReceivedSegment
from stitch_server.engine.relay import ReceivedStep, Relay
from tests.support.engine_fakes import WIDTH, FakeDownstream, FakeUpstream, ManualClock, computed, sampled

CUTS = {"weak": Cut(2, 8), "strong": Cut(4, 8)}
BLOCKS = 32


def segment(
    session: int,
    length: int = 4,
    position: int = 0,
    *,
    epoch: int = 0,
    wants_token: bool = True,
    chain: tuple[str, ...] = (),
    route: str = "weak",
    reused: int = 0,
) -> ReceivedSegment:
    """Of a prompt of 40 tokens; at its beginning it opens the session."""
    opening = Opening(route, chain, Sampling(), tuple(range(40)), 40, reused) if position == reused else None
    return ReceivedSegment(session, epoch, position, length, wants_token, opening)


def rows_of(*segments: ReceivedSegment) -> Tensor:
    """One row a token, which says its position."""
    positions = [torch.arange(one.position, one.position + one.length) for one in segments]
    return torch.cat(positions)[:, None].expand(-1, WIDTH).float()


@dataclass
class Bench:
    """A relay with fakes at both ends."""

    last: bool
    pool: BlockPool = field(default_factory=lambda: BlockPool(BLOCKS))
    clock: ManualClock = field(default_factory=ManualClock)
    downstream: FakeDownstream = field(default_factory=FakeDownstream)
    up: FakeUpstream = field(default_factory=FakeUpstream)
    batch_tokens: int = 16
    step: int = 0

    def __post_init__(self) -> None:
        forwarding = None if self.last else Forwarding(self.downstream, "float32")
        intake = Intake(self.pool, CUTS, forwarding)
        self.relay = Relay(self.pool, intake, forwarding, self.batch_tokens, self.clock)

    def receive(self, *segments: ReceivedSegment, upstream: FakeUpstream | None = None, pipelined: bool = False) -> int:
        self.step += 1
        hidden: Callable[[], Tensor] = lambda: rows_of(*segments)  # noqa: E731
        self.relay.receive(ReceivedStep(upstream or self.up, self.step, segments, hidden, pipelined))
        return self.step

    def compose(self) -> Batch:
        batch = self.relay.next_batch()
        assert batch is not None
        return batch

    def compute(self, spoilt: tuple[int, ...] = (), **stages: float) -> Batch:
        batch = self.compose()
        output = sampled(batch, spoilt, stages) if self.last else computed(batch, spoilt, stages)
        self.relay.deliver(batch, output)
        return batch

    @property
    def idle(self) -> bool:
        return (self.relay.running_sessions, self.pool.free_blocks) == (0, BLOCKS)


def causes(reply: Reply) -> list[tuple[int, str]]:
    """Sessions that failed, and why."""
    return [
        (one.number, shard_pb2.FailureCause.Name(one.cause).removeprefix("FAILURE_CAUSE_")) for one in reply.failures
    ]


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
        assert bench.up.last.tokens == ((5, 0, Token(7, 4)),)
        assert bench.up.last.stages == {"queue": 0.0, "top_prefill": 0.5}
        assert bench.relay.running_sessions == 2

    def test_a_segment_has_the_rows_that_were_sent_for_it(self, bench: Bench) -> None:
        bench.receive(segment(5, 3, route="strong"), segment(6, 2))
        batch = bench.compose()
        assert [one.cut for one in batch.segments] == [CUTS["weak"], CUTS["strong"]]
        rows = [one.hidden for one in batch.segments]
        assert [None if one is None else one[:, 0].tolist() for one in rows] == [[0.0, 1.0], [0.0, 1.0, 2.0]]

    def test_steps_that_wait_are_merged(self, bench: Bench) -> None:
        other = FakeUpstream()
        first, second = bench.receive(segment(5)), bench.receive(segment(5), upstream=other)
        bench.clock.advance(2.0)
        batch = bench.compute()
        assert batch.tokens == 8
        assert [reply.step for reply in bench.up.replies + other.replies] == [first, second]
        assert bench.up.last.stages["queue"] == pytest.approx(2.0)

    def test_a_batch_ends_where_it_would_be_too_large(self, bench: Bench) -> None:
        for session in (5, 6, 7):
            bench.receive(segment(session, 8))
        assert [bench.compute().tokens, bench.compute().tokens] == [16, 8]
        assert bench.relay.next_batch() is None

    def test_one_large_step_is_computed_whole(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.receive(segment(6, 1))
        assert bench.compute().tokens == 40

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
        sequence = bench.compute().segments[0].sequence
        assert sequence.token_ids == [*range(40), 7]

    def test_computed_beginnings_are_shared(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.compute()
        bench.receive(segment(6, 8, position=32, reused=32))
        bench.compute()
        assert bench.up.last.tokens == ((6, 0, Token(7, 40)),)

    def test_a_refused_segment_disturbs_no_other(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6, 2, position=3), segment(7))
        batch = bench.compute()
        assert [one.hidden[:, 0].tolist() for one in batch.segments if one.hidden is not None] == [[0, 1, 2, 3]] * 2
        assert [number for number, _, _ in bench.up.last.tokens] == [5, 7]
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
        assert bench.compute().tokens == 4
        assert len(bench.up.replies) == 2

    def test_without_room_a_session_is_told_so(self, bench: Bench) -> None:
        bench.receive(replace(segment(5), length=BLOCKS * 16 + 1))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "KV_EXHAUSTED")]
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
        assert [causes(reply) for reply in bench.up.replies] == [[(5, "KV_EXHAUSTED")]] * 2
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
        assert bench.up.replies[1].tokens == ((5, 1, Token(7, 4)),)

    def test_a_link_that_ended_leaves_nothing(self, bench: Bench) -> None:
        other = FakeUpstream()
        bench.receive(segment(5))
        bench.compute()
        bench.receive(segment(5, 1, position=4))
        bench.receive(segment(6), upstream=other)
        bench.relay.link_closed(bench.up)
        assert bench.compute().tokens == 4
        assert len(bench.up.replies) == 1
        assert len(other.replies) == 1
        bench.relay.link_closed(other)
        assert bench.idle

    def test_a_spoilt_segment_ends_its_session_alone(self, bench: Bench) -> None:
        bench.receive(segment(5), segment(6))
        bench.compute(spoilt=(0,))
        assert causes(bench.up.last) == [(5, "PRECONDITION")]
        assert "session 5 at position 0 are not finite" in bench.up.last.failures[0].message
        assert [number for number, _, _ in bench.up.last.tokens] == [6]
        assert bench.relay.running_sessions == 1

    def test_what_follows_a_spoilt_chunk_is_answered_too(self, bench: Bench) -> None:
        bench.receive(segment(5, 8, wants_token=False))
        bench.receive(segment(5, 4, position=8))
        bench.compute(spoilt=(0,))
        assert [reply.step for reply in bench.up.replies] == [1, 2]
        assert causes(bench.up.replies[0]) == [(5, "PRECONDITION")]
        assert bench.idle

    def test_spoilt_tokens_are_not_shared(self, bench: Bench) -> None:
        bench.receive(segment(5, 40))
        bench.compute(spoilt=(0,))
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
        bench.relay.replied(Reply(1))
        bench.relay.lost("end:1", Unavailable("gone"))
        assert bench.up.replies == []


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
        assert [one.sequence.cached for one in sent.segments] == [4, 4]
        bench.relay.replied(bench.downstream.answer(sent))
        assert bench.up.last.step == step
        assert bench.up.last.tokens == ((5, 0, Token(7, 4)), (6, 0, Token(7, 4)))

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
        assert bench.up.last.tokens == ((6, 0, Token(8, 4)), (5, 0, Token(9, 4)))

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
        assert [reply.tokens for reply in bench.up.replies] == [(), ((5, 0, Token(7, 12)),)]

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
        number = sent.segments[0].sequence.number
        failure = Failure(number, 0, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, "no block")
        bench.relay.replied(Reply(sent.number, failures=(failure,)))
        assert bench.up.last.failures == (replace(failure, number=5),)
        assert bench.relay.running_sessions == 1

    def test_a_late_failure_spares_a_session_that_began_anew(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        sent = bench.downstream.last
        bench.relay.close(bench.up, [5])
        bench.receive(self.middle(5, epoch=1))
        bench.compute()
        number = sent.segments[0].sequence.number
        failure = Failure(number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.relay.replied(Reply(sent.number, failures=(failure,)))
        assert bench.up.last.failures[0].epoch == 0
        assert bench.relay.running_sessions == 1

    def test_a_refusal_here_frees_the_session_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        number = bench.downstream.last.segments[0].sequence.number
        bench.receive(replace(self.middle(5, 1, 4), length=BLOCKS * 16))
        assert bench.relay.next_batch() is None
        assert causes(bench.up.last) == [(5, "KV_EXHAUSTED")]
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
        failure = Failure(sent.segments[0].sequence.number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.relay.replied(Reply(sent.number, failures=(failure,)))
        assert [causes(reply) for reply in bench.up.replies] == [[(5, "KV_EXHAUSTED")]] * 2

    def test_a_spoilt_chunk_closes_what_its_batch_has_opened_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5, 8, wants_token=False))
        bench.receive(self.middle(5, 4, 8))
        batch = bench.compute(spoilt=(1,))
        assert bench.downstream.last.opens == (True,)
        assert bench.downstream.closed == [("end:1", batch.segments[0].sequence.number)]
        assert causes(bench.up.last) == [(5, "PRECONDITION")]

    def test_a_closed_session_is_closed_behind(self, bench: Bench) -> None:
        bench.receive(self.middle(5))
        bench.compute()
        bench.relay.close(bench.up, [5])
        assert bench.downstream.closed == [("end:1", bench.downstream.last.segments[0].sequence.number)]
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
        assert [number for number, _, _ in bench.up.last.tokens] == [6]

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
        bench.relay.deliver(bench.compose(), StepOutput(hidden=(torch.zeros(4, WIDTH),), spoilt=frozenset({0})))
        assert bench.downstream.sent == []
        assert causes(bench.up.last) == [(5, "PRECONDITION")]

    def test_an_answer_that_nobody_waits_for_is_ignored(self, bench: Bench) -> None:
        bench.relay.replied(Reply(99, tokens=((1, 0, Token(7, 4)),)))
        assert bench.up.replies == []
