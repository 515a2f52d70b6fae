"""What a client hears of its session, and what is left of it afterwards: nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Unavailable
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.types import OutgoingStep, RouteDecision
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID, computed, new_request
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids


@pytest.fixture
def harness() -> FirstStageHarness:
    return FirstStageHarness()


class TestGenerating:
    def test_tokens_go_round_until_there_are_enough(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit(20, max_tokens=3)
        for token in (50, 51, 52):
            harness.reply(harness.compute(), token)
        assert token_ids(outputs) == [50, 51, 52]
        assert [one.token.position for one in outputs if one.token] == [20, 21, 22]
        assert [one.finish_reason for one in outputs] == [None, None, FINISH_REASON_LENGTH]
        assert [(one.segments[0].position, len(one.hidden)) for _, one in harness.downstream.sent] == [
            (0, 20),
            (20, 1),
            (21, 1),
        ]
        assert harness.downstream.closed == [("top:1", session.id)]
        assert harness.idle

    def test_a_stop_token_ends_it(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(stop_token_ids=(60,))
        harness.reply(harness.compute(), 60)
        assert outputs[0].finish_reason == FINISH_REASON_STOP
        assert token_ids(outputs) == [60]
        assert harness.idle

    def test_a_prompt_in_chunks_is_answered_once(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=8)
        _, outputs = harness.admit(12)
        harness.reply(harness.compute())
        assert outputs == []
        harness.reply(harness.compute())
        assert token_ids(outputs) == [TOKEN_ID]

    def test_routes_share_a_batch(self, harness: FirstStageHarness) -> None:
        harness.admit(5, route="weak")
        harness.admit(6, route="strong")
        batch = harness.next_batch()
        assert [one.layers.end for one in batch.segments] == [4, 3]

    def test_nothing_is_composed_beyond_the_window(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=4)
        harness.admit(20)
        assert not harness.next_batch().pipelined
        harness = FirstStageHarness(max_prefill_chunk=4)
        harness.admit(20)
        first = harness.compute()
        assert first.pipelined
        assert harness.next_batch().pipelined
        harness.admit(20, first_token=100)
        harness.compute()
        assert harness.stage.next_batch() is None
        harness.reply(first)
        assert harness.stage.next_batch() is not None

    def test_without_sessions_there_is_no_batch(self, harness: FirstStageHarness) -> None:
        assert harness.stage.next_batch() is None

    def test_what_is_computed_is_shared(self, harness: FirstStageHarness) -> None:
        harness.admit(2 * BLOCK_TOKENS + 3)
        harness.compute()
        session, _ = harness.admit(2 * BLOCK_TOKENS + 3)
        step = harness.compute()
        assert (step.segments[0].position, session.reused) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)

    def test_a_session_that_can_not_be_taken_hears_why(self) -> None:
        harness = FirstStageHarness(blocks=2)
        _, outputs = harness.admit(100)
        assert isinstance(error_of(outputs), Exhausted)
        assert harness.idle


class TestStages:
    def test_they_add_up_to_the_time_to_the_first_token(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=8)
        _, outputs = harness.admit(12)
        harness.clock.advance(1.0)
        for seconds in (2.0, 3.0):
            batch = harness.next_batch()
            harness.clock.advance(seconds)
            harness.stage.deliver(batch, computed(batch))
        harness.clock.advance(10.0)
        first, second = (step for _, step in harness.downstream.sent)
        harness.reply(first, stitch=1.0)
        harness.reply(second, stitch=0.5, top_prefill=2.0, queue=0.25, wire=0.125)
        assert outputs[0].stages == {
            "queue": 1.25,
            "bottom_prefill": 5.0,
            "stitch": 0.5,
            "top_prefill": 2.0,
            "wire": 10.0 - 2.75,
        }
        assert sum(outputs[0].stages.values()) == pytest.approx(16.0)

    def test_only_the_first_token_has_them(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.reply(harness.compute(), sample=1.0)
        harness.reply(harness.compute(), sample=1.0)
        assert outputs[0].stages
        assert outputs[1].stages == {}

    def test_the_wire_takes_no_negative_time(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.reply(harness.compute(), top_prefill=5.0)
        assert outputs[0].stages["wire"] == 0.0

    def test_layers_of_one_model_on_two_shards_count_together(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        batch = harness.next_batch()
        harness.clock.advance(2.0)
        harness.stage.deliver(batch, computed(batch))
        harness.reply(harness.downstream.last, bottom_prefill=3.0)
        assert outputs[0].stages["bottom_prefill"] == pytest.approx(5.0)


class TestAbandoning:
    def test_while_it_waits(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=20)
        harness.admit(20)
        session, outputs = harness.admit(20)
        harness.stage.abandon(session)
        assert (outputs, harness.downstream.closed, harness.stage.waiting_sessions) == ([], [], 1)

    def test_while_it_is_under_way(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        step = harness.compute()
        harness.stage.abandon(session)
        harness.stage.abandon(session)
        assert harness.downstream.closed == [("top:1", session.id)]
        harness.reply(step)
        assert outputs == []
        assert harness.idle

    def test_one_that_was_never_admitted(self, harness: FirstStageHarness) -> None:
        harness.stage.abandon(new_request())
        assert harness.idle

    def test_others_go_on(self, harness: FirstStageHarness) -> None:
        gone, _ = harness.admit()
        _, outputs = harness.admit(first_token=100)
        step = harness.compute()
        harness.stage.abandon(gone)
        harness.reply(step)
        assert token_ids(outputs) == [TOKEN_ID]


class TestVerdicts:
    """A session that came with candidates takes the route that its first pass decides."""

    @staticmethod
    def decided(harness: FirstStageHarness, decision: RouteDecision) -> OutgoingStep:
        batch = harness.next_batch()
        harness.stage.deliver(batch, replace(computed(batch), decisions={0: decision}))
        return harness.downstream.last

    def admit(self, harness: FirstStageHarness) -> tuple[Request, list[RequestOutput]]:
        return harness.admit(route="", chain=(), candidates={"weak": ("top:1",), "strong": ("top:2",)})

    def test_its_rows_go_where_the_verdict_says(self) -> None:
        harness = FirstStageHarness()
        session, outputs = self.admit(harness)
        decision = RouteDecision("strong", 0.8, (0.0, 0.5), (0.2,))
        step = self.decided(harness, decision)
        assert harness.downstream.sent[-1][0] == "top:2"
        assert (session.route, session.chain) == ("strong", ("top:2",))
        assert outputs == [RequestOutput(decision=decision)]
        harness.reply(step)
        assert outputs[-1].token is not None

    def test_a_lost_shard_does_not_touch_the_undecided(self) -> None:
        harness = FirstStageHarness()
        _, outputs = self.admit(harness)
        harness.stage.on_link_lost("top:1", Unavailable("gone"))
        assert outputs == []

    def test_it_can_be_abandoned_before_and_after(self) -> None:
        harness = FirstStageHarness()
        session, _ = self.admit(harness)
        harness.stage.abandon(session)
        assert harness.idle
        session, _ = self.admit(harness)
        self.decided(harness, RouteDecision("weak"))
        harness.stage.abandon(session)
        assert harness.idle
        assert harness.downstream.closed == [("top:1", session.id)]

    def test_a_pass_that_fails_ends_it(self) -> None:
        harness = FirstStageHarness()
        _, outputs = self.admit(harness)
        harness.stage.fail(harness.next_batch(), ZeroDivisionError("no"))
        assert outputs[-1].error is not None
        assert harness.idle
