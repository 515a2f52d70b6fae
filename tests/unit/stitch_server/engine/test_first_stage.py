"""What a client hears of its session, and what is left of it afterwards: nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Unavailable
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.types import OutgoingStep, RouteDecision
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID, computed, new_session
from tests.support.origin_bench import OriginBench, error_of, ids


@pytest.fixture
def bench() -> OriginBench:
    return OriginBench()


class TestGenerating:
    def test_tokens_go_round_until_there_are_enough(self, bench: OriginBench) -> None:
        session, heard = bench.admit(20, max_tokens=3)
        for token in (50, 51, 52):
            bench.reply(bench.compute(), token)
        assert ids(heard) == [50, 51, 52]
        assert [one.token.position for one in heard if one.token] == [20, 21, 22]
        assert [one.finish_reason for one in heard] == [None, None, FINISH_REASON_LENGTH]
        assert [(one.segments[0].position, len(one.hidden)) for _, one in bench.downstream.sent] == [
            (0, 20),
            (20, 1),
            (21, 1),
        ]
        assert bench.downstream.closed == [("top:1", session.id)]
        assert bench.idle

    def test_a_stop_token_ends_it(self, bench: OriginBench) -> None:
        _, heard = bench.admit(stop_token_ids=(60,))
        bench.reply(bench.compute(), 60)
        assert heard[0].finish_reason == FINISH_REASON_STOP
        assert ids(heard) == [60]
        assert bench.idle

    def test_a_prompt_in_chunks_is_answered_once(self) -> None:
        bench = OriginBench(prefill_tokens=8)
        _, heard = bench.admit(12)
        bench.reply(bench.compute())
        assert heard == []
        bench.reply(bench.compute())
        assert ids(heard) == [TOKEN_ID]

    def test_routes_share_a_batch(self, bench: OriginBench) -> None:
        bench.admit(5, route="weak")
        bench.admit(6, route="strong")
        batch = bench.compose()
        assert [one.layers.end for one in batch.segments] == [4, 3]

    def test_nothing_is_composed_beyond_the_window(self) -> None:
        bench = OriginBench(prefill_tokens=4)
        bench.admit(20)
        assert not bench.compose().pipelined
        bench = OriginBench(prefill_tokens=4)
        bench.admit(20)
        first = bench.compute()
        assert first.pipelined
        assert bench.compose().pipelined
        bench.admit(20, first_token=100)
        bench.compute()
        assert bench.origin.next_batch() is None
        bench.reply(first)
        assert bench.origin.next_batch() is not None

    def test_without_sessions_there_is_no_batch(self, bench: OriginBench) -> None:
        assert bench.origin.next_batch() is None

    def test_what_is_computed_is_shared(self, bench: OriginBench) -> None:
        bench.admit(2 * BLOCK_TOKENS + 3)
        bench.compute()
        session, _ = bench.admit(2 * BLOCK_TOKENS + 3)
        step = bench.compute()
        assert (step.segments[0].position, session.reused) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)

    def test_a_session_that_can_not_be_taken_hears_why(self) -> None:
        bench = OriginBench(blocks=2)
        _, heard = bench.admit(100)
        assert isinstance(error_of(heard), Exhausted)
        assert bench.idle


class TestStages:
    def test_they_add_up_to_the_time_to_the_first_token(self) -> None:
        bench = OriginBench(prefill_tokens=8)
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

    def test_only_the_first_token_has_them(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute(), sample=1.0)
        bench.reply(bench.compute(), sample=1.0)
        assert heard[0].stages
        assert heard[1].stages == {}

    def test_the_wire_takes_no_negative_time(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        bench.reply(bench.compute(), top_prefill=5.0)
        assert heard[0].stages["wire"] == 0.0

    def test_layers_of_one_model_on_two_shards_count_together(self, bench: OriginBench) -> None:
        _, heard = bench.admit()
        batch = bench.compose()
        bench.clock.advance(2.0)
        bench.origin.deliver(batch, computed(batch))
        bench.reply(bench.downstream.last, bottom_prefill=3.0)
        assert heard[0].stages["bottom_prefill"] == pytest.approx(5.0)


class TestAbandoning:
    def test_while_it_waits(self) -> None:
        bench = OriginBench(prefill_tokens=20)
        bench.admit(20)
        session, heard = bench.admit(20)
        bench.origin.abandon(session)
        assert (heard, bench.downstream.closed, bench.origin.waiting_sessions) == ([], [], 1)

    def test_while_it_is_under_way(self, bench: OriginBench) -> None:
        session, heard = bench.admit()
        step = bench.compute()
        bench.origin.abandon(session)
        bench.origin.abandon(session)
        assert bench.downstream.closed == [("top:1", session.id)]
        bench.reply(step)
        assert heard == []
        assert bench.idle

    def test_one_that_was_never_admitted(self, bench: OriginBench) -> None:
        bench.origin.abandon(new_session())
        assert bench.idle

    def test_others_go_on(self, bench: OriginBench) -> None:
        gone, _ = bench.admit()
        _, heard = bench.admit(first_token=100)
        step = bench.compute()
        bench.origin.abandon(gone)
        bench.reply(step)
        assert ids(heard) == [TOKEN_ID]


class TestVerdicts:
    """A session that came with candidates takes the route that its first pass decides."""

    @staticmethod
    def decided(bench: OriginBench, decision: RouteDecision) -> OutgoingStep:
        batch = bench.compose()
        bench.origin.deliver(batch, replace(computed(batch), decisions={0: decision}))
        return bench.downstream.last

    def admit(self, bench: OriginBench) -> tuple[Request, list[RequestOutput]]:
        return bench.admit(route="", chain=(), candidates={"weak": ("top:1",), "strong": ("top:2",)})

    def test_its_rows_go_where_the_verdict_says(self) -> None:
        bench = OriginBench(probe_tokens=8)
        session, heard = self.admit(bench)
        decision = RouteDecision("strong", 0.8, (0.0, 0.5), (0.2,))
        step = self.decided(bench, decision)
        assert bench.downstream.sent[-1][0] == "top:2"
        assert (session.route, session.chain) == ("strong", ("top:2",))
        assert heard == [RequestOutput(decision=decision)]
        bench.reply(step)
        assert heard[-1].token is not None

    def test_a_lost_shard_does_not_touch_the_undecided(self) -> None:
        bench = OriginBench(probe_tokens=8)
        _, heard = self.admit(bench)
        bench.origin.lost("top:1", Unavailable("gone"))
        assert heard == []

    def test_it_can_be_abandoned_before_and_after(self) -> None:
        bench = OriginBench(probe_tokens=8)
        session, _ = self.admit(bench)
        bench.origin.abandon(session)
        assert bench.idle
        session, _ = self.admit(bench)
        self.decided(bench, RouteDecision("weak"))
        bench.origin.abandon(session)
        assert bench.idle
        assert bench.downstream.closed == [("top:1", session.id)]

    def test_a_pass_that_fails_ends_it(self) -> None:
        bench = OriginBench(probe_tokens=8)
        _, heard = self.admit(bench)
        bench.origin.fail(bench.compose(), ZeroDivisionError("no"))
        assert heard[-1].error is not None
        assert bench.idle
