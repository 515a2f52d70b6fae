"""What a client hears of its session, and what is left of it afterwards: nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Incompatible, OutOfStep, StitchError, Unavailable
from stitch.v1 import shard_pb2
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.cache.pool import BLOCK_TOKENS, BlockPool
from stitch_server.engine.batch import Batch, Cut, Verdict
from stitch_server.engine.forwarding import Failure, Forwarding, OutgoingStep, Reply
from stitch_server.engine.origin import Origin
from stitch_server.engine.scheduler import BACKOFF_SECONDS, Limits
from stitch_server.engine.session import Progress, Session
from tests.support.engine_fakes import TOKEN_ID, FakeDownstream, ManualClock, computed, new_session

CUTS = {"weak": Cut(0, 3), "strong": Cut(0, 4)}


class Bench:
    """An origin in front of a chain that answers by hand."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.pool, self.clock, self.downstream = BlockPool(blocks), ManualClock(), FakeDownstream()
        self.origin = Origin(
            self.pool,
            CUTS,
            Limits(**{"prompts_together": 1} | limits),
            Forwarding(self.downstream, "float32", window_steps=2),
            self.clock,
        )

    def admit(self, tokens: int = 20, **fields: object) -> tuple[Session, list[Progress]]:
        heard: list[Progress] = []
        session = new_session(tokens, heard=heard, **fields)  # type: ignore[arg-type]
        self.origin.admit(session)
        return session, heard

    def compose(self) -> Batch:
        batch = self.origin.next_batch()
        assert batch is not None
        return batch

    def compute(self) -> OutgoingStep:
        batch = self.compose()
        self.origin.deliver(batch, computed(batch))
        return self.downstream.last

    def reply(self, step: OutgoingStep, token_id: int = TOKEN_ID, **stages: float) -> None:
        self.origin.replied(replace(self.downstream.answer(step, token_id), stages=stages))

    def refuse(self, step: OutgoingStep, session: Session, cause: FailureCause) -> None:
        self.origin.replied(Reply(step.number, failures=(Failure(session.number, session.epoch, cause, "no more"),)))

    @property
    def idle(self) -> bool:
        origin = self.origin
        counts = (origin.running_sessions, origin.waiting_sessions, origin._sessions)
        return counts == (0, 0, {}) and self.pool.free_blocks == self.pool.blocks


def ids(heard: list[Progress]) -> list[int]:
    return [progress.token.id for progress in heard if progress.token is not None]


def error_of(heard: list[Progress]) -> StitchError:
    """The only thing that the client heard last."""
    assert heard[-1].error is not None
    assert (heard[-1].token, heard[-1].finish_reason) == (None, None)
    return heard[-1].error


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestGenerating:
    def test_tokens_go_round_until_there_are_enough(self, bench: Bench) -> None:
        session, heard = bench.admit(20, max_tokens=3)
        for token in (50, 51, 52):
            bench.reply(bench.compute(), token)
        assert ids(heard) == [50, 51, 52]
        assert [one.token.position for one in heard if one.token] == [20, 21, 22]
        assert [one.finish_reason for one in heard] == [None, None, FINISH_REASON_LENGTH]
        assert [(one.segments[0].position, one.rows.tokens) for _, one in bench.downstream.sent] == [
            (0, 20),
            (20, 1),
            (21, 1),
        ]
        assert bench.downstream.closed == [("top:1", session.number)]
        assert bench.idle

    def test_a_stop_token_ends_it(self, bench: Bench) -> None:
        _, heard = bench.admit(stop_token_ids=(60,))
        bench.reply(bench.compute(), 60)
        assert heard[0].finish_reason == FINISH_REASON_STOP
        assert ids(heard) == [60]
        assert bench.idle

    def test_a_prompt_in_chunks_is_answered_once(self) -> None:
        bench = Bench(prefill_tokens=8)
        _, heard = bench.admit(12)
        bench.reply(bench.compute())
        assert heard == []
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]

    def test_routes_share_a_batch(self, bench: Bench) -> None:
        bench.admit(5, route="weak")
        bench.admit(6, route="strong")
        batch = bench.compose()
        assert [one.cut.leave for one in batch.segments] == [4, 3]

    def test_nothing_is_composed_beyond_the_window(self) -> None:
        bench = Bench(prefill_tokens=4)
        bench.admit(20)
        assert not bench.compose().pipelined
        bench = Bench(prefill_tokens=4)
        bench.admit(20)
        first = bench.compute()
        assert first.pipelined
        assert bench.compose().pipelined
        bench.admit(20, first_token=100)
        bench.compute()
        assert bench.origin.next_batch() is None
        bench.reply(first)
        assert bench.origin.next_batch() is not None

    def test_a_batch_knows_when_the_neighbour_has_come_to_its_end(self) -> None:
        bench = Bench(prefill_tokens=4)
        bench.admit(20)
        step, batch = bench.compute(), bench.compose()
        assert batch.pipelined
        assert not batch.neighbour_idle()
        bench.origin.heard(step.number)
        assert batch.neighbour_idle()

    def test_without_sessions_there_is_no_batch(self, bench: Bench) -> None:
        assert bench.origin.next_batch() is None

    def test_what_is_computed_is_shared(self, bench: Bench) -> None:
        bench.admit(2 * BLOCK_TOKENS + 3)
        bench.compute()
        session, _ = bench.admit(2 * BLOCK_TOKENS + 3)
        step = bench.compute()
        assert (step.segments[0].position, session.reused) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)

    def test_a_session_that_can_not_be_taken_hears_why(self) -> None:
        bench = Bench(blocks=2)
        _, heard = bench.admit(100)
        assert isinstance(error_of(heard), Exhausted)
        assert bench.idle


class TestStages:
    def test_they_add_up_to_the_time_to_the_first_token(self) -> None:
        bench = Bench(prefill_tokens=8)
        _, heard = bench.admit(12)
        bench.clock.advance(1.0)
        for seconds in (2.0, 3.0):
            batch = bench.compose()
            bench.clock.advance(seconds)
            bench.origin.deliver(batch, computed(batch))
        bench.clock.advance(10.0)
        first, second = (step for _, step in bench.downstream.sent)
        bench.reply(first, stitch=1.0)
        bench.reply(second, stitch=0.5, top_prefill=2.0, queue=0.25, wire=0.125)
        assert heard[0].stages == {
            "queue": 1.25,
            "bottom_prefill": 5.0,
            "stitch": 0.5,
            "top_prefill": 2.0,
            "wire": 10.0 - 2.75,
        }
        assert sum(heard[0].stages.values()) == pytest.approx(16.0)

    def test_only_the_first_token_has_them(self, bench: Bench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute(), sample=1.0)
        bench.reply(bench.compute(), sample=1.0)
        assert heard[0].stages
        assert heard[1].stages == {}

    def test_the_wire_takes_no_negative_time(self, bench: Bench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute(), top_prefill=5.0)
        assert heard[0].stages["wire"] == 0.0

    def test_layers_of_one_model_on_two_shards_count_together(self, bench: Bench) -> None:
        _, heard = bench.admit()
        batch = bench.compose()
        bench.clock.advance(2.0)
        bench.origin.deliver(batch, computed(batch))
        bench.reply(bench.downstream.last, bottom_prefill=3.0)
        assert heard[0].stages["bottom_prefill"] == pytest.approx(5.0)


class TestAbandoning:
    def test_while_it_waits(self) -> None:
        bench = Bench(prefill_tokens=20)
        bench.admit(20)
        session, heard = bench.admit(20)
        bench.origin.abandon(session)
        assert (heard, bench.downstream.closed, bench.origin.waiting_sessions) == ([], [], 1)

    def test_while_it_is_under_way(self, bench: Bench) -> None:
        session, heard = bench.admit()
        step = bench.compute()
        bench.origin.abandon(session)
        bench.origin.abandon(session)
        assert bench.downstream.closed == [("top:1", session.number)]
        bench.reply(step)
        assert heard == []
        assert bench.idle

    def test_one_that_was_never_admitted(self, bench: Bench) -> None:
        bench.origin.abandon(new_session())
        assert bench.idle

    def test_others_go_on(self, bench: Bench) -> None:
        gone, _ = bench.admit()
        _, heard = bench.admit(first_token=100)
        step = bench.compute()
        bench.origin.abandon(gone)
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]


class TestFailures:
    def test_without_room_behind_it_comes_back_later(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100)
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert heard == []
        assert (session.epoch, bench.origin.waiting_sessions) == (1, 1)
        assert bench.downstream.closed == [("top:1", session.number)]
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        # Its first block is still remembered here.
        assert (step.segments[0].position, step.opens) == (BLOCK_TOKENS, (True,))
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]

    def test_what_it_had_said_is_not_said_again(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100, max_tokens=1)
        bench.reply(bench.compute(), 50)
        bench.admit(first_token=200)
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        assert [one.length for one in step.segments if one.sequence is session] == [21 - BLOCK_TOKENS]
        bench.reply(step, 51)
        assert ids(heard) == [50, 51]

    def test_alone_here_it_may_still_wait_for_sessions_of_another_first_shard(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert (heard, bench.origin.waiting_sessions) == ([], 1)

    def test_it_hears_that_it_never_fits(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_TOO_LONG)
        error = error_of(heard)
        assert isinstance(error, Exhausted)
        assert error.retry_after_seconds == 60.0
        assert bench.idle

    def test_where_its_beginning_is_gone_it_computes_everything(self, bench: Bench) -> None:
        bench.admit(40)
        bench.compute()
        session, heard = bench.admit(40)
        step = bench.compute()
        assert session.reused == 32
        bench.refuse(step, session, shard_pb2.FAILURE_CAUSE_PREFIX_MISSING)
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        assert (step.segments[0].sequence, step.segments[0].position) == (session, 0)
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]

    def test_a_shard_that_is_gone_tells_how_far_it_came(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.reply(bench.compute())
        bench.reply(bench.compute())
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_UNAVAILABLE)
        error = error_of(heard)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("no more", 2)
        assert bench.idle

    @pytest.mark.parametrize("cause", [shard_pb2.FAILURE_CAUSE_PRECONDITION, shard_pb2.FAILURE_CAUSE_UNSPECIFIED])
    def test_a_contradiction_ends_it(self, bench: Bench, cause: FailureCause) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, cause)
        assert isinstance(error_of(heard), OutOfStep)
        assert bench.downstream.closed == [("top:1", session.number)]
        assert bench.idle

    def test_what_belongs_to_an_earlier_epoch_is_void(self, bench: Bench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100)
        step = bench.compute()
        answer = bench.downstream.answer(step)
        bench.refuse(step, session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        late = Failure(session.number, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.origin.replied(replace(answer, failures=(late,)))
        assert heard == []
        assert session.epoch == 1

    def test_a_batch_that_can_not_be_computed_ends_its_sessions(self, bench: Bench) -> None:
        _, heard = bench.admit()
        bench.origin.fail(bench.compose(), RuntimeError("out of paper"))
        assert "out of paper" in str(error_of(heard))
        assert bench.idle

    def test_other_sessions_are_not_in_that_batch(self) -> None:
        bench = Bench(prefill_tokens=20)
        bench.admit(20)
        _, heard = bench.admit(20, first_token=100)
        bench.origin.fail(bench.compose(), RuntimeError("out of paper"))
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]


class TestLoss:
    def test_sessions_on_the_lost_shard_end(self, bench: Bench) -> None:
        _, heard = bench.admit(chain=("a:1",))
        _, other = bench.admit(chain=("b:1",), first_token=100)
        bench.compute()
        bench.origin.lost("a:1", Unavailable("a:1 is gone"))
        error = error_of(heard)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("a:1 is gone", 0)
        bench.reply(bench.downstream.last)
        assert ids(other) == [TOKEN_ID]

    def test_a_refusal_stays_what_it_is(self, bench: Bench) -> None:
        _, heard = bench.admit()
        bench.compute()
        bench.origin.lost("top:1", Incompatible("another tokenizer"))
        assert isinstance(error_of(heard), Incompatible)

    def test_steps_to_it_are_no_longer_awaited(self, bench: Bench) -> None:
        for index in range(2):
            bench.admit(first_token=100 * index)
            bench.compute()
        assert bench.origin.next_batch() is None
        bench.origin.lost("top:1", Unavailable("gone"))
        bench.admit(first_token=500)
        assert bench.origin.next_batch() is not None

    def test_between_two_steps_as_well(self, bench: Bench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute())
        bench.origin.lost("top:1", Unavailable("gone"))
        assert isinstance(error_of(heard), Unavailable)
        assert bench.idle

    def test_who_was_never_there_goes_on(self) -> None:
        bench = Bench(prefill_tokens=20)
        bench.admit(20)
        _, heard = bench.admit(20, first_token=100)
        bench.compute()
        bench.origin.lost("top:1", Unavailable("gone"))
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]

    def test_what_reached_it_over_a_new_link_meanwhile_is_closed(self, bench: Bench) -> None:
        session, _ = bench.admit()
        bench.compute()
        bench.origin.lost("top:1", Unavailable("gone"))
        assert bench.downstream.closed == [("top:1", session.number)]


class TestVerdicts:
    """A session that came with candidates takes the route that its first pass decides."""

    @staticmethod
    def decided(bench: Bench, verdict: Verdict) -> OutgoingStep:
        batch = bench.compose()
        bench.origin.deliver(batch, replace(computed(batch), verdicts={0: verdict}))
        return bench.downstream.last

    def admit(self, bench: Bench) -> tuple[Session, list[Progress]]:
        return bench.admit(route="", chain=(), candidates={"weak": ("top:1",), "strong": ("top:2",)})

    def test_its_rows_go_where_the_verdict_says(self) -> None:
        bench = Bench(probe_tokens=8)
        session, heard = self.admit(bench)
        verdict = Verdict("strong", 0.8, (0.0, 0.5), (0.2,))
        step = self.decided(bench, verdict)
        assert bench.downstream.sent[-1][0] == "top:2"
        assert (session.route, session.chain) == ("strong", ("top:2",))
        assert heard == [Progress(verdict=verdict)]
        bench.reply(step)
        assert heard[-1].token is not None

    def test_a_lost_shard_does_not_touch_the_undecided(self) -> None:
        bench = Bench(probe_tokens=8)
        _, heard = self.admit(bench)
        bench.origin.lost("top:1", Unavailable("gone"))
        assert heard == []

    def test_it_can_be_abandoned_before_and_after(self) -> None:
        bench = Bench(probe_tokens=8)
        session, _ = self.admit(bench)
        bench.origin.abandon(session)
        assert bench.idle
        session, _ = self.admit(bench)
        self.decided(bench, Verdict("weak"))
        bench.origin.abandon(session)
        assert bench.idle
        assert bench.downstream.closed == [("top:1", session.number)]

    def test_a_pass_that_fails_ends_it(self) -> None:
        bench = Bench(probe_tokens=8)
        _, heard = self.admit(bench)
        bench.origin.fail(bench.compose(), ZeroDivisionError("no"))
        assert heard[-1].error is not None
        assert bench.idle
