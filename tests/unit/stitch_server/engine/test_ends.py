"""Routes that end on a first or a middle shard, and routes that begin on one that continues others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stitch.errors import OutOfStep
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH
from stitch.v1.shard_pb2 import FAILURE_CAUSE_NOT_COMPILED, FAILURE_CAUSE_PRECONDITION
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.local_hop import BothStages, LocalLink
from stitch_server.engine.loop import Inbox
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.request import Request, RequestOutput, RequestStatus
from stitch_server.engine.scheduler import Scheduler
from stitch_server.engine.types import Batch, KvRoom, LayerRange, LinkReply, SessionRefused, SessionToken, StepOutput
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from tests.support.engine_fakes import (
    TOKEN_ID,
    WIDTH,
    FakeUpstream,
    any_chain,
    computed,
    new_request,
    sampled,
    without_states,
)
from tests.support.first_stage_harness import FirstStageHarness, error_of, token_ids
from tests.support.next_stage_harness import NextStageHarness, segment
from tests.support.scheduler_harness import new_batching

HERE: tuple[str, ...] = ()


def both(batch: Batch) -> StepOutput:
    """Hidden states of all segments, and a token for each segment that wants one and whose route ends here."""
    tokens = sampled(batch).tokens
    ending = {index: token for index, token in tokens.items() if not batch.segments[index].session.chain}
    return replace(computed(batch), tokens=ending, stages={"sample": 0.25})


class TestFirstStage:
    @pytest.fixture
    def harness(self) -> FirstStageHarness:
        return FirstStageHarness()

    def compute(self, harness: FirstStageHarness) -> Batch:
        batch = harness.next_batch()
        harness.clock.advance(1.0)
        harness.stage.deliver(batch, both(batch))
        return batch

    def test_sampled_tokens_are_fed_back_without_a_next_shard(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(20, chain=HERE, max_tokens=3)
        batches = [self.compute(harness) for _ in range(3)]
        assert [one.segments[0].position for one in batches] == [0, 20, 21]
        assert token_ids(outputs) == [TOKEN_ID] * 3
        assert outputs[-1].finish_reason == FINISH_REASON_LENGTH
        assert outputs[0].stages == {"sample": 0.25, "queue": 0.0, "bottom_prefill": 0.75}
        assert harness.downstream.sent == harness.downstream.closed == []
        assert harness.idle

    def test_one_pass_is_sampled_and_sent(self, harness: FirstStageHarness) -> None:
        _, ended = harness.admit(5, chain=HERE)
        _, going_on = harness.admit(6, route="strong")
        assert len(self.compute(harness).segments) == 2
        assert (token_ids(ended), token_ids(going_on)) == ([TOKEN_ID], [])
        sent = harness.downstream.last
        assert [one.length for one in sent.segments] == [6]
        assert sent.hidden.shape == (6, WIDTH)
        harness.reply(sent)
        assert token_ids(going_on) == [TOKEN_ID]

    def test_logits_that_are_not_finite_end_the_request(self, harness: FirstStageHarness) -> None:
        _, outputs = harness.admit(5, chain=HERE)
        batch = harness.next_batch()
        harness.stage.deliver(batch, StepOutput(non_finite={0: "logits"}))
        assert isinstance(error_of(outputs), OutOfStep)
        assert "logits of request" in str(error_of(outputs))
        assert harness.idle

    def test_request_whose_grammar_is_not_compiled_is_recomputed(self, harness: FirstStageHarness) -> None:
        request, outputs = harness.admit(20, chain=HERE)
        batch = harness.next_batch()
        refused = SessionRefused(FAILURE_CAUSE_NOT_COMPILED, "not yet")
        harness.stage.deliver(batch, StepOutput(refused={0: refused}))
        assert (request.status, outputs) == (RequestStatus.PREEMPTED, [])
        assert self.compute(harness).segments[0].position == BLOCK_TOKENS
        assert token_ids(outputs) == [TOKEN_ID]

    def test_request_waits_for_no_next_shard(self, harness: FirstStageHarness) -> None:
        harness.downstream.suspects = {"top-0"}
        _, refused = harness.admit(5)
        _, outputs = harness.admit(5, chain=HERE)
        self.compute(harness)
        assert error_of(refused) is not None
        assert token_ids(outputs) == [TOKEN_ID]


class TestNextStage:
    def test_one_step_is_sampled_and_sent(self) -> None:
        harness = NextStageHarness(last=False)
        step = harness.receive(segment(5, chain=HERE), segment(6, chain=("top-0",)))
        batch = harness.next_batch()
        harness.stage.deliver(batch, both(batch))
        assert harness.up.replies == []
        assert [one.session.chain for one in harness.downstream.last.segments] == [("top-0",)]
        harness.answer(harness.downstream.answer(harness.downstream.last))
        assert harness.up.last.step == step
        assert {one.session_id for one in harness.up.last.tokens} == {5, 6}

    def test_refused_grammar_of_a_route_that_ends_here_is_replied(self) -> None:
        harness = NextStageHarness(last=False)
        harness.receive(segment(5, chain=HERE))
        batch = harness.next_batch()
        refused = {0: SessionRefused(FAILURE_CAUSE_PRECONDITION, "no grammar")}
        harness.stage.deliver(batch, replace(both(batch), tokens={}, refused=refused))
        assert [one.cause for one in harness.up.last.failures] == [FAILURE_CAUSE_PRECONDITION]


class BothHarness:
    """A shard on which `small` begins and `weak` goes on, and both end."""

    def __init__(self, blocks: int = 32) -> None:
        ranges = {"small": LayerRange(0, 8), "weak": LayerRange(2, 8)}
        self.pool, self.inbox, self.up = BlockPool(blocks), Inbox(), FakeUpstream()
        self.next_stage = NextStage(without_states(self.pool), ranges, None, any_chain, 64)
        in_flight = StepsInFlight(LocalLink("top-0", frozenset({"small"}), self.next_stage, self.inbox.put))
        self.counted = BlockPool(blocks)
        kept = without_states(self.counted)
        scheduler = Scheduler(
            kept,
            ranges,
            new_batching(),
            close_downstream=in_flight.close_session,
            has_room=in_flight.has_room,
            credit=in_flight.credit,
        )
        self.first_stage = FirstStage(kept, scheduler, in_flight, stage="top_prefill")
        self.source = BothStages("top-0", self.first_stage, self.next_stage, self.embed)
        self.embedded: list[list[int]] = []

    def embed(self, ids: list[int]) -> torch.Tensor:
        self.embedded.append(ids)
        return torch.tensor(ids)[:, None].expand(-1, WIDTH).float()

    def admit(self, tokens: int = 20, **fields: int) -> tuple[Request, list[RequestOutput]]:
        outputs: list[RequestOutput] = []
        request = new_request(tokens, "small", chain=("top-0",), outputs=outputs, **fields)
        self.first_stage.admit(request)
        return request, outputs

    def step(self) -> Batch | None:
        """One pass, and what it has put into the inbox."""
        batch = self.source.next_batch()
        if batch is not None:
            self.source.deliver(batch, sampled(batch))
        while not self.inbox.empty():
            match self.inbox.get():
                case LinkReply(neighbour, reply):
                    self.source.on_reply(neighbour, reply)
                case KvRoom(neighbour, tokens):
                    self.source.on_kv_room(neighbour, tokens)
        return batch


class TestBothStages:
    def test_own_tokens_are_embedded_and_fed_back(self) -> None:
        harness = BothHarness()
        _, outputs = harness.admit(5, max_tokens=3)
        while not outputs or outputs[-1].finish_reason is None:
            harness.step()
        assert harness.embedded == [[0, 1, 2, 3, 4], [TOKEN_ID], [TOKEN_ID]]
        assert token_ids(outputs) == [TOKEN_ID] * 3
        assert len(harness.next_stage._sessions) == 0
        assert harness.pool.usage == harness.counted.usage == 0.0

    def test_one_pass_holds_steps_of_links_and_own_requests(self) -> None:
        harness = BothHarness()
        _, outputs = harness.admit(5)
        link = NextStageHarness(last=True)
        link.stage, link.up = harness.next_stage, harness.up
        link.receive(segment(5))
        batch = harness.step()
        assert batch is not None
        assert [(one.session.route, one.length) for one in batch.segments] == [("small", 5), ("weak", 4)]
        assert token_ids(outputs) == [TOKEN_ID]
        assert [(one.session_id, one.token.id) for one in harness.up.last.tokens] == [(5, TOKEN_ID)]
        assert isinstance(harness.up.last.tokens[0], SessionToken)

    def test_request_waits_for_room_that_links_hold_and_gets_it(self) -> None:
        harness = BothHarness(blocks=4)
        link = NextStageHarness(last=True)
        link.stage, link.up = harness.next_stage, harness.up
        link.receive(segment(5, 40))
        harness.step()
        _, outputs = harness.admit(20, max_tokens=2)
        for _ in range(3):
            harness.step()
        assert token_ids(outputs) == []
        harness.next_stage.close(harness.up, [5])
        for _ in range(6):
            harness.step()
        assert token_ids(outputs) == [TOKEN_ID] * 2

    def test_abandoned_request_frees_its_kv(self) -> None:
        harness = BothHarness()
        request, _ = harness.admit(20)
        harness.step()
        assert harness.pool.usage > 0
        harness.first_stage.abandon(request)
        assert harness.pool.usage == harness.counted.usage == 0.0

    def test_draining_shard_refuses_links_and_computes_its_own_requests(self) -> None:
        harness = BothHarness()
        _, outputs = harness.admit(5)
        harness.next_stage.drain()
        link = NextStageHarness(last=True)
        link.stage, link.up = harness.next_stage, harness.up
        link.receive(segment(5))
        harness.step()
        assert token_ids(outputs) == [TOKEN_ID]
        assert len(harness.up.last.failures) == 1
