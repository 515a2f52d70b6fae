"""The outputs that a client of the first stage receives; a finished request leaves nothing in the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stitch.errors import Exhausted, Expired, Unavailable
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from stitch_server.engine.request import Request, RequestOutput, RequestStatus
from stitch_server.engine.types import OutgoingStep, RouteDecision
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID, computed, new_request
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids


@pytest.fixture
def harness() -> FirstStageHarness:
    return FirstStageHarness()


class TestGenerating:
    def test_tokens_are_fed_back_until_max_tokens(self, harness: FirstStageHarness) -> None:
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
        assert harness.downstream.closed == [("top-0", session.id)]
        assert harness.idle

    def test_stop_token_finishes_request(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(stop_token_ids=(60,))
        harness.reply(harness.compute(), 60)
        assert outputs[0].finish_reason == FINISH_REASON_STOP
        assert token_ids(outputs) == [60]
        assert harness.idle

    def test_prompt_in_chunks_yields_one_token(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=8)
        _, outputs = harness.admit(12)
        harness.reply(harness.compute())
        assert outputs == []
        harness.reply(harness.compute())
        assert token_ids(outputs) == [TOKEN_ID]

    def test_requests_of_two_routes_share_batch(self, harness: FirstStageHarness) -> None:
        harness.admit(5, route="weak")
        harness.admit(6, route="strong")
        batch = harness.next_batch()
        assert [one.layers.end for one in batch.segments] == [4, 3]

    def test_full_window_yields_no_batch(self) -> None:
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

    def test_first_stage_without_requests_yields_no_batch(self, harness: FirstStageHarness) -> None:
        assert harness.stage.next_batch() is None

    def test_computed_prefix_is_shared(self, harness: FirstStageHarness) -> None:
        harness.admit(2 * BLOCK_TOKENS + 3)
        harness.compute()
        session, outputs = harness.admit(2 * BLOCK_TOKENS + 3)
        step = harness.compute()
        assert (step.segments[0].position, session.reused) == (2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS)
        harness.reply(step)
        assert [one.cached_tokens for one in outputs] == [2 * BLOCK_TOKENS]

    def test_refused_request_receives_error(self) -> None:
        harness = FirstStageHarness(blocks=2)
        _, outputs = harness.admit(100)
        assert isinstance(error_of(outputs), Exhausted)
        assert harness.idle


class TestStages:
    def test_stages_add_up_to_time_to_first_token(self) -> None:
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

    def test_only_first_token_has_stages(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.reply(harness.compute(), sample=1.0)
        harness.reply(harness.compute(), sample=1.0)
        assert outputs[0].stages
        assert outputs[1].stages == {}

    def test_wire_stage_is_never_negative(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        harness.reply(harness.compute(), top_prefill=5.0)
        assert outputs[0].stages["wire"] == 0.0

    def test_prefill_of_two_bottom_shards_is_one_stage(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit()
        batch = harness.next_batch()
        harness.clock.advance(2.0)
        harness.stage.deliver(batch, computed(batch))
        harness.reply(harness.downstream.last, bottom_prefill=3.0)
        assert outputs[0].stages["bottom_prefill"] == pytest.approx(5.0)


class TestAbandon:
    def test_waiting_request_is_removed(self) -> None:
        harness = FirstStageHarness(max_prefill_chunk=20)
        harness.admit(20)
        session, outputs = harness.admit(20)
        harness.stage.abandon(session)
        assert (outputs, harness.downstream.closed, harness.stage.waiting_sessions) == ([], [], 1)

    def test_running_request_is_closed_downstream(self, harness: FirstStageHarness) -> None:
        session, outputs = harness.admit()
        step = harness.compute()
        harness.stage.abandon(session)
        harness.stage.abandon(session)
        assert harness.downstream.closed == [("top-0", session.id)]
        harness.reply(step)
        assert outputs == []
        assert harness.idle

    def test_unknown_request_has_no_effect(self, harness: FirstStageHarness) -> None:
        harness.stage.abandon(new_request())
        assert harness.idle

    def test_other_requests_continue(self, harness: FirstStageHarness) -> None:
        gone, _ = harness.admit()
        _, outputs = harness.admit(first_token=100)
        step = harness.compute()
        harness.stage.abandon(gone)
        harness.reply(step)
        assert token_ids(outputs) == [TOKEN_ID]


class TestRouteDecision:
    """A request with candidates takes the route that the probe selects in its first pass."""

    @staticmethod
    def decided(harness: FirstStageHarness, decision: RouteDecision) -> OutgoingStep:
        batch = harness.next_batch()
        harness.stage.deliver(batch, replace(computed(batch), decisions={0: decision}))
        return harness.downstream.last

    def admit(self, harness: FirstStageHarness) -> tuple[Request, list[RequestOutput]]:
        return harness.admit(route="", chain=(), candidates={"weak": ("top-0",), "strong": ("top-1",)})

    def test_hidden_states_go_to_selected_chain(self) -> None:
        harness = FirstStageHarness()
        session, outputs = self.admit(harness)
        decision = RouteDecision("strong", 0.8, (0.0, 0.5), (0.2,))
        step = self.decided(harness, decision)
        assert harness.downstream.sent[-1][0] == "top-1"
        assert (session.route, session.chain) == ("strong", ("top-1",))
        assert outputs == [RequestOutput(decision=decision)]
        harness.reply(step)
        assert outputs[-1].token is not None

    def test_lost_link_spares_request_without_route(self) -> None:
        harness = FirstStageHarness()
        _, outputs = self.admit(harness)
        harness.stage.on_link_lost("top-0", Unavailable("gone"))
        assert outputs == []

    def test_request_is_abandoned_before_and_after_its_decision(self) -> None:
        harness = FirstStageHarness()
        session, _ = self.admit(harness)
        harness.stage.abandon(session)
        assert harness.idle
        session, _ = self.admit(harness)
        self.decided(harness, RouteDecision("weak"))
        harness.stage.abandon(session)
        assert harness.idle
        assert harness.downstream.closed == [("top-0", session.id)]

    def test_failed_pass_ends_request_without_route(self) -> None:
        harness = FirstStageHarness()
        _, outputs = self.admit(harness)
        harness.stage.fail(harness.next_batch(), ZeroDivisionError("no"))
        assert outputs[-1].error is not None
        assert harness.idle


def test_request_whose_deadline_passed_in_the_queue_is_not_computed() -> None:
    harness = FirstStageHarness()
    request, outputs = harness.admit(deadline=harness.clock.now + 5.0)
    harness.clock.advance(5.0)
    assert harness.stage.next_batch() is None
    assert isinstance(error_of(outputs), Expired)
    assert (request.status, harness.idle) == (RequestStatus.FINISHED, True)


def test_running_request_is_not_ended_by_its_deadline() -> None:
    harness = FirstStageHarness()
    _, outputs = harness.admit(deadline=harness.clock.now + 5.0)
    step = harness.compute()
    harness.clock.advance(5.0)
    harness.reply(step)
    assert token_ids(outputs) == [TOKEN_ID]
