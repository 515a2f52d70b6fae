"""Any sequence of events leaves scheduler and block pool consistent: no block leaks, no position is skipped."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stitch.errors import Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.request import Request, RequestOutput, RequestStatus
from stitch_server.engine.types import OutgoingStep, SessionFailure, StepReply
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from tests.support.engine_fakes import FakeDownstream, ManualClock, computed, new_request
from tests.support.first_stage_harness import LAYER_RANGES, new_first_stage
from tests.support.scheduler_harness import request_of

NEIGHBOURS = ("top-0", "top-1")
CAUSES = (
    shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED,
    shard_pb2.FAILURE_CAUSE_PREFIX_MISSING,
    shard_pb2.FAILURE_CAUSE_UNAVAILABLE,
    shard_pb2.FAILURE_CAUSE_PRECONDITION,
)


class FirstStageMachine(RuleBasedStateMachine):
    """A first stage with little KV, under arrivals, passes, replies in any order, failures, cancels and lost links."""

    @initialize(
        blocks=st.integers(3, 10),
        chunk=st.sampled_from([5, 17, 40]),
        tokens=st.sampled_from([16, 60]),
        budget=st.sampled_from([1, 8]),
        micro_batches=st.integers(1, 3),
    )
    def start(self, blocks: int, chunk: int, tokens: int, budget: int, micro_batches: int) -> None:
        self.pool, self.clock, self.downstream = BlockPool(blocks), ManualClock(), FakeDownstream()
        self.stage = new_first_stage(
            self.pool,
            self.downstream,
            self.clock,
            window_steps=3,
            max_prefill_chunk=chunk,
            max_num_batched_tokens=tokens,
            prefill_budget_while_decoding=budget,
            num_micro_batches=micro_batches,
        )
        self.requests: dict[int, tuple[Request, list[RequestOutput]]] = {}
        self.unanswered: list[tuple[str, OutgoingStep]] = []
        # The position that comes next, by request and epoch.
        self.expected: dict[tuple[int, int], int] = {}

    @rule(
        tokens=st.integers(1, 60),
        first_token=st.sampled_from([0, 1000]),
        max_tokens=st.integers(1, 12),
        route=st.sampled_from(sorted(LAYER_RANGES)),
        neighbour=st.sampled_from(NEIGHBOURS),
    )
    def admit(self, tokens: int, first_token: int, max_tokens: int, route: str, neighbour: str) -> None:
        outputs: list[RequestOutput] = []
        request = new_request(
            tokens, route, chain=(neighbour,), outputs=outputs, first_token=first_token, max_tokens=max_tokens
        )
        self.requests[request.id] = (request, outputs)
        self.stage.admit(request)

    @rule()
    def compute(self) -> None:
        batch = self.stage.next_batch()
        if batch is None:
            return
        for segment in batch.segments:
            request = request_of(segment)
            key = (request.id, request.epoch)
            assert segment.position == self.expected.get(key, request.reused)
            assert segment.length >= 1
            assert len(segment.blocks) * BLOCK_TOKENS >= segment.position + segment.length == request.cached
            self.expected[key] = segment.position + segment.length
        sent = len(self.downstream.sent)
        self.stage.deliver(batch, computed(batch))
        self.unanswered += self.downstream.sent[sent:]

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def reply(self, data: st.DataObject) -> None:
        neighbour, step = self.unanswered.pop(data.draw(st.integers(0, len(self.unanswered) - 1)))
        self.stage.on_reply(neighbour, self.downstream.answer(step))

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), cause=st.sampled_from(CAUSES))
    def fail_one_session(self, data: st.DataObject, cause: shard_pb2.FailureCause) -> None:
        neighbour, step = self.unanswered.pop(data.draw(st.integers(0, len(self.unanswered) - 1)))
        failed = data.draw(st.sampled_from(step.segments)).session
        answer = self.downstream.answer(step)
        tokens = tuple(one for one in answer.tokens if one.session_id != failed.id)
        failure = SessionFailure(failed.id, failed.epoch, cause, "no more")
        self.stage.on_reply(neighbour, StepReply(step.number, tokens, (failure,)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request, _ = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        self.stage.abandon(request)

    @rule(neighbour=st.sampled_from(NEIGHBOURS))
    def lose_link(self, neighbour: str) -> None:
        self.unanswered = [one for one in self.unanswered if one[0] != neighbour]
        self.stage.on_link_lost(neighbour, Unavailable(f"{neighbour} is gone"))

    @rule()
    def wait(self) -> None:
        self.clock.advance(0.05)

    @invariant()
    def blocks_belong_to_running_requests(self) -> None:
        scheduler = self.stage.scheduler
        holders: dict[int, list[tuple[Request, int]]] = defaultdict(list)
        for request in scheduler.running.values():
            assert request.status is RequestStatus.RUNNING
            for index, block in enumerate(self.pool.blocks_of(request.id)):
                holders[block].append((request, index))
        assert self.pool.free_blocks == self.pool.blocks - len(holders)
        for (first, index), *others in holders.values():
            for other, place in others:
                prefix = (index + 1) * BLOCK_TOKENS
                assert (other.route, place) == (first.route, index)
                assert other.token_ids[:prefix] == first.token_ids[:prefix]

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        scheduler = self.stage.scheduler
        assert len(set(map(id, scheduler.waiting))) == len(scheduler.waiting)
        for request, outputs in self.requests.values():
            ended = request.status is RequestStatus.FINISHED
            places = (request.id in scheduler.running, request in scheduler.waiting, ended)
            assert places.count(True) == 1
            assert all(one.finish_reason is None and one.error is None for one in outputs[:-1])
            positions = [one.token.position for one in outputs if one.token is not None]
            assert positions == list(range(request.prompt_tokens, request.prompt_tokens + len(positions)))

    def teardown(self) -> None:
        """Without further faults every request ends, and every block is free."""
        if not hasattr(self, "stage"):
            return
        for _ in range(5000):
            if all(request.status is RequestStatus.FINISHED for request, _ in self.requests.values()):
                break
            self.wait()
            self.compute()
            if self.unanswered:
                neighbour, step = self.unanswered.pop(0)
                self.stage.on_reply(neighbour, self.downstream.answer(step))
        assert (self.stage.running_sessions, self.stage.waiting_sessions) == (0, 0)
        assert self.pool.free_blocks == self.pool.blocks


FirstStageMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
TestFirstStageMachine = FirstStageMachine.TestCase
