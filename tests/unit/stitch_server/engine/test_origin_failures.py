"""What becomes of sessions where shards behind have no room, fail or are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Incompatible, OutOfStep, Unavailable
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.scheduler import BACKOFF_SECONDS
from stitch_server.engine.types import SessionFailure
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID
from tests.support.origin_bench import OriginBench, error_of, ids


@pytest.fixture
def bench() -> OriginBench:
    return OriginBench()


class TestFailures:
    def test_without_room_behind_it_comes_back_later(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100)
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert heard == []
        assert (session.epoch, bench.origin.waiting_sessions) == (1, 1)
        assert bench.downstream.closed == [("top:1", session.id)]
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        # Its first block is still remembered here.
        assert (step.segments[0].position, step.opens) == (BLOCK_TOKENS, (True,))
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]

    def test_what_it_had_said_is_not_said_again(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100, max_tokens=1)
        bench.reply(bench.compute(), 50)
        bench.admit(first_token=200)
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        assert [one.length for one in step.segments if one.session is session] == [21 - BLOCK_TOKENS]
        bench.reply(step, 51)
        assert ids(heard) == [50, 51]

    def test_alone_here_it_may_still_wait_for_sessions_of_another_first_shard(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        assert (heard, bench.origin.waiting_sessions) == ([], 1)

    def test_it_hears_that_it_never_fits(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_TOO_LONG)
        error = error_of(heard)
        assert isinstance(error, Exhausted)
        assert error.retry_after_seconds == 60.0
        assert bench.idle

    def test_where_its_beginning_is_gone_it_computes_everything(self, bench: OriginBench) -> None:
        bench.admit(40)
        bench.compute()
        session, heard = bench.admit(40)
        step = bench.compute()
        assert session.reused == 32
        bench.refuse(step, session, shard_pb2.FAILURE_CAUSE_PREFIX_MISSING)
        bench.clock.advance(BACKOFF_SECONDS)
        step = bench.compute()
        assert (step.segments[0].session, step.segments[0].position) == (session, 0)
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]

    def test_a_shard_that_is_gone_tells_how_far_it_came(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.reply(bench.compute())
        bench.reply(bench.compute())
        bench.refuse(bench.compute(), session, shard_pb2.FAILURE_CAUSE_UNAVAILABLE)
        error = error_of(heard)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("no more", 2)
        assert bench.idle

    @pytest.mark.parametrize("cause", [shard_pb2.FAILURE_CAUSE_PRECONDITION, shard_pb2.FAILURE_CAUSE_UNSPECIFIED])
    def test_a_contradiction_ends_it(self, bench: OriginBench, cause: FailureCause) -> None:
        session, heard = bench.admit()
        bench.refuse(bench.compute(), session, cause)
        assert isinstance(error_of(heard), OutOfStep)
        assert bench.downstream.closed == [("top:1", session.id)]
        assert bench.idle

    def test_what_belongs_to_an_earlier_epoch_is_void(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        bench.admit(first_token=100)
        step = bench.compute()
        answer = bench.downstream.answer(step)
        bench.refuse(step, session, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED)
        late = SessionFailure(session.id, 0, shard_pb2.FAILURE_CAUSE_PRECONDITION, "not open")
        bench.origin.replied(replace(answer, failures=(late,)))
        assert heard == []
        assert session.epoch == 1

    def test_a_batch_that_can_not_be_computed_ends_its_sessions(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        bench.origin.fail(bench.compose(), RuntimeError("out of paper"))
        assert "out of paper" in str(error_of(heard))
        assert bench.idle

    def test_other_sessions_are_not_in_that_batch(self) -> None:
        bench = OriginBench(prefill_tokens=20)
        bench.admit(20)
        _, heard = bench.admit(20, first_token=100)
        bench.origin.fail(bench.compose(), RuntimeError("out of paper"))
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]


class TestLoss:
    def test_sessions_on_the_lost_shard_end(self, bench: OriginBench) -> None:
        _, heard = bench.admit(chain=("a:1",))
        _, other = bench.admit(chain=("b:1",), first_token=100)
        bench.compute()
        bench.origin.lost("a:1", Unavailable("a:1 is gone"))
        error = error_of(heard)
        assert isinstance(error, Unavailable)
        assert (str(error), error.generated_tokens) == ("a:1 is gone", 0)
        bench.reply(bench.downstream.last)
        assert ids(other) == [TOKEN_ID]

    def test_a_refusal_stays_what_it_is(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        bench.compute()
        bench.origin.lost("top:1", Incompatible("another tokenizer"))
        assert isinstance(error_of(heard), Incompatible)

    def test_steps_to_it_are_no_longer_awaited(self, bench: OriginBench) -> None:
        for index in range(2):
            bench.admit(first_token=100 * index)
            bench.compute()
        assert bench.origin.next_batch() is None
        bench.origin.lost("top:1", Unavailable("gone"))
        bench.admit(first_token=500)
        assert bench.origin.next_batch() is not None

    def test_between_two_steps_as_well(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute())
        bench.origin.lost("top:1", Unavailable("gone"))
        assert isinstance(error_of(heard), Unavailable)
        assert bench.idle

    def test_who_was_never_there_goes_on(self) -> None:
        bench = OriginBench(prefill_tokens=20)
        bench.admit(20)
        _, heard = bench.admit(20, first_token=100)
        bench.compute()
        bench.origin.lost("top:1", Unavailable("gone"))
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]

    def test_what_reached_it_over_a_new_link_meanwhile_is_closed(self, bench: OriginBench) -> None:
        session, _ = bench.admit()
        bench.compute()
        bench.origin.lost("top:1", Unavailable("gone"))
        assert bench.downstream.closed == [("top:1", session.id)]
