"""A scheduler over a block pool; a test appends the tokens that the chain would sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stitch.cluster import BatchingConfig
from stitch_server.engine.kv_room import KvCredit
from stitch_server.engine.request import Request
from stitch_server.engine.scheduler import NO_COSTS, Scheduler
from stitch_server.engine.types import LayerRange, Segment
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import TOKEN_ID, FakeDownstream, ManualClock, new_request, without_states

LAYER_RANGES = {"weak": LayerRange(0, 3), "strong": LayerRange(0, 4)}


class SchedulerHarness:
    """A scheduler and its block pool. Fields of `BatchingConfig` are given by name."""

    def __init__(
        self,
        blocks: int = 64,
        *,
        attention_cost_per_token: int = 0,
        min_efficient_tokens: int = 1,
        probe_tokens: int = 0,
        route_costs: Mapping[str, float] = NO_COSTS,
        answer_tokens: float = 0.0,
        **batching: int,
    ) -> None:
        self.pool, self.clock = BlockPool(blocks), ManualClock()
        self.batching = new_batching(**batching)
        self.closed_downstream: list[Request] = []
        self.scheduler = Scheduler(
            without_states(self.pool),
            LAYER_RANGES,
            self.batching,
            close_downstream=self.closed_downstream.append,
            credit=UnlimitedCredit(FakeDownstream()),
            answer_tokens=answer_tokens,
            attention_cost_per_token=attention_cost_per_token,
            min_efficient_tokens=min_efficient_tokens,
            probe_tokens=probe_tokens,
            route_costs=route_costs,
            clock=self.clock,
        )

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def next_pass(self) -> list[tuple[Request, int, int]]:
        """The next pass as (request, position, length)."""
        return [(request_of(one), one.position, one.length) for one in self.scheduler.next_segments()]

    def answer(self, *requests: Request) -> None:
        """The chain samples a token for each of these."""
        for request in requests:
            request.first_token_at = request.first_token_at or self.clock()
            request.token_ids.append(TOKEN_ID)

    def decoding(self, *tokens: int) -> list[Request]:
        """Requests with prompts of these lengths, which are computed and have their first token."""
        requests = [new_request(count, first_token=100 * index) for index, count in enumerate(tokens)]
        self.add(*requests)
        while any(request.remaining for request in requests):
            self.scheduler.next_segments()
        self.answer(*requests)
        return requests


class UnlimitedCredit(KvCredit):
    """Next shards that have room for everything."""

    def has_room(self, chain: Sequence[str], tokens: int) -> bool:
        return True


def new_batching(**fields: int) -> BatchingConfig:
    """A configuration with two micro-batches, whose passes hold one chunk of a prompt by default."""
    chunk = fields.get("max_prefill_chunk", 128)
    return BatchingConfig(**{"num_micro_batches": 2, "max_num_batched_tokens": chunk} | fields)


def request_of(segment: Segment) -> Request:
    """The request that a segment belongs to."""
    assert isinstance(segment.session, Request)
    return segment.session
