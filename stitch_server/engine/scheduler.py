"""Selects the tokens that the first shard computes in its next pass, and the KV blocks that they are written to.

In: requests, and `BatchingConfig`. Out: the segments of one pass. Invariant: a running request holds blocks for all of
its cached tokens, and no request that waits, was preempted or is finished holds any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from stitch.cluster import BatchingConfig
from stitch.errors import Exhausted
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.kv_room import KvCredit
from stitch_server.engine.request import Request, RequestStatus
from stitch_server.engine.types import LayerRange, Segment
from stitch_server.engine.waiting import WaitingRequests

# The expected length of an answer until some have ended, and the weight of each that ends.
INITIAL_ANSWER_TOKENS, ANSWER_WEIGHT = 64.0, 0.2
# Every DECODES_PER_EXTRA_SHARE decoding requests add one more share to the prefill budget: their step takes longer
# than that of one, so the same prefill delays it by a smaller part.
DECODES_PER_EXTRA_SHARE = 2
# A matmul computes rows in tiles: one row more than a multiple takes about as long as a full tile.
TILE_ROWS = 32
# How long a client should wait before it retries a prompt that exceeds the KV cache.
TOO_LARGE_RETRY_SECONDS = 60.0
NO_COSTS: Mapping[str, float] = MappingProxyType({})


class PrefillBudget:
    """How many prompt tokens one pass may hold, in units of one token without context.

    While requests decode, a token costs 1 + KV length / `attention_cost_per_token`, since its attention over a long
    context delays their next tokens, too.
    """

    def __init__(self, tokens: int, attention_cost_per_token: int = 0) -> None:
        """`attention_cost_per_token`: the KV length whose attention costs as much as all else of a token; 0: none."""
        self._left = float(tokens)
        self._attention_cost_per_token = attention_cost_per_token
        self._is_untouched = True

    @property
    def is_exhausted(self) -> bool:
        """Whether the pass takes no further prompt token."""
        return self._left <= 0

    def affords(self, tokens: int) -> bool:
        """Whether a chunk of at least `tokens` may start; the first one of a pass always may."""
        return self._is_untouched or tokens <= self._left

    def tokens_at(self, kv_length: int) -> int:
        """The tokens that the rest of the budget affords to a request of this KV length."""
        return int(self._left / self._cost_at(kv_length))

    def spend(self, tokens: int, kv_length: int) -> None:
        """Deducts a chunk, which may exceed the rest of the budget."""
        self._left -= tokens * self._cost_at(kv_length)
        self._is_untouched = self._is_untouched and not tokens

    def _cost_at(self, kv_length: int) -> float:
        return 1 + kv_length / self._attention_cost_per_token if self._attention_cost_per_token else 1.0


class Scheduler:
    """Continuous batching with chunked prefill. Each pass is composed in this order:

    0. With one micro-batch, prompts of tenants whose turn comes before that of every tenant with an answer under way
       have a pass of their own, whatever is in flight: they wait for one pass at most. The next one is no such pass.
    1. With one micro-batch, nothing while a step is in flight: the shards of the chain compute in turn.
    2. Decodes: one token of each decoding request, or with N micro-batches of every N-th, least recently scheduled
       first. While requests decode, a pass without decodes is not computed: it would delay tokens that are coming back.
       Neither this rule nor the first one waits for a next shard that is late.
    3. Prefill: chunks of running requests and of waiting ones, the tenants by virtual time and running requests first
       within a tenant, until the `PrefillBudget` or the KV blocks are exhausted. The budget is
       `max_num_batched_tokens`; while requests decode, it is one share of `prefill_budget_while_decoding` per prompt
       and per DECODES_PER_EXTRA_SHARE decodes.
    A pass holds only requests whose next shard has room for one more step; the others keep their place.
    A request is admitted where this shard and the next one have KV room for all the tokens that it is expected to have
    in the end: its known ones, and an answer of the mean length of the last ones within its `max_tokens`.
    A request that needs a block when none is free preempts the youngest running request, which is recomputed later.
    Tenants are charged every computed token by the parameters that its route reads.
    """

    def __init__(
        self,
        kept: KeptPrefixes,
        layer_ranges: Mapping[str, LayerRange],
        batching: BatchingConfig,
        *,
        close_downstream: Callable[[Request], None],
        credit: KvCredit,
        answer_tokens: float = INITIAL_ANSWER_TOKENS,
        attention_cost_per_token: int = 0,
        min_efficient_tokens: int = 1,
        probe_tokens: int = 0,
        has_room: Callable[[Sequence[str]], bool] = lambda next_shards: True,
        is_late: Callable[[Sequence[str]], bool] = lambda next_shards: False,
        route_costs: Mapping[str, float] = NO_COSTS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`kept` has the KV blocks of the requests, and the hidden states of their prefixes.

        `min_efficient_tokens`: fewer take about as long; `probe_tokens`: what the route probe reads of a prompt.
        `route_costs`: what tenants are charged for one token of a route, relative to other routes.
        `close_downstream` is called with a preempted request, whose KV the next shards must free as well.
        `credit` is the KV room of the next shards; `answer_tokens` is the expected length of the first answers.
        `has_room` and `is_late` tell about the next shards of a request.
        """
        self._pool = kept.pool
        self._kept = kept
        self._layer_ranges = layer_ranges
        # The layers that all routes have in common.
        self._common_layers = min(layer_ranges.values(), key=lambda layers: layers.end)
        self._batching = batching
        self._close_downstream = close_downstream
        self._credit = credit
        self._answer_tokens = answer_tokens
        self._attention_cost_per_token = attention_cost_per_token
        self._min_efficient_tokens = min_efficient_tokens
        self._probe_tokens = probe_tokens
        self._has_room = has_room
        self._is_late = is_late
        self._route_costs = route_costs
        # Until its route is decided, a request is charged as if on the cheapest one.
        self._lowest_cost = min(route_costs.values(), default=1.0)
        self._clock = clock
        self._passes = 0
        # Whether the last pass was one of prompts that went before others' answers.
        self._has_overtaken = False
        self.waiting = WaitingRequests(batching.max_waiting_sessions, clock)
        # By id, in order of admission: the last one is the youngest.
        self.running: dict[int, Request] = {}

    def add(self, request: Request) -> None:
        """Queues a request. Raises Exhausted where the queue is full, or the KV cache cannot hold the prompt."""
        tokens, capacity = len(request.token_ids), self._pool.tokens
        if tokens + 1 > capacity:
            message = f"the prompt has {tokens} tokens, but the KV cache holds {capacity}"
            raise Exhausted(message, TOO_LARGE_RETRY_SECONDS)
        # Even alone in the KV cache, it could not grow further.
        request.context_length = min(request.context_length, capacity)
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Finishes a request, waiting or running, and frees its KV on this shard."""
        if self.running.pop(request.id, None) is None:
            self.waiting.remove(request)
        else:
            self._learn_length(request)
        self._pool.release(request.id)
        request.status = RequestStatus.FINISHED

    def preempt(self, request: Request) -> None:
        """Frees the request's KV on all shards and queues it first, to be recomputed when there is room."""
        self.running.pop(request.id, None)
        if request.generated > self._answer_tokens:
            self._learn_length(request)
        self._pool.release(request.id)
        self._close_downstream(request)
        request.reset_for_recompute()
        request.status = RequestStatus.PREEMPTED
        self.waiting.put_back(request)

    def share_prefix(self, request: Request) -> None:
        """The request has its route, so that the blocks of its prompt can serve others on the same route."""
        self._pool.set_hashes(request.id, self._prefix_hashes(request))

    @property
    def has_work(self) -> bool:
        """Whether the next pass would hold a segment of a running request."""
        if self._waits_for(self._unanswered()):
            return False
        decoding = [request for request in self.running.values() if request.is_decoding]
        return any(request.remaining for request in decoding or self.running.values())

    def next_segments(self) -> list[Segment]:
        """The segments of the next pass; empty where there is nothing to compute."""
        self._passes += 1
        unanswered = self._unanswered()
        may_send = self._may_send_to_others if unanswered else self._may_send
        if overtaking := self._overtaking_segments(may_send):
            self._has_overtaken = True
            return overtaking
        if self._waits_for(unanswered):
            return []
        self._has_overtaken = False
        decoding = [request for request in self.running.values() if request.is_decoding]
        segments = self._decode_segments(decoding, may_send)
        if decoding and not segments:
            if self._waits_for(decoding):
                return []
            may_send = self._may_send_to_others
        budget = self._prefill_budget(len(decoding))
        for request in self._prompts(may_send):
            self._admit_before(self.waiting.turn_of(request), budget, segments, may_send)
            if request.status is RequestStatus.RUNNING:
                self._prefill(request, budget, segments)
        self._admit_before(math.inf, budget, segments, may_send)
        for neighbour in self._credit.wanting:
            if neighbour not in self.waiting.next_shards:
                self._credit.withdraw(neighbour)
        return segments

    def _overtaking_segments(self, may_send: Callable[[Request], bool]) -> list[Segment]:
        """Prompts of tenants whose turn comes before that of every tenant with an answer under way."""
        answers = [one for one in self.running.values() if one.first_token_at is not None]
        is_shared = self._batching.num_micro_batches == 1
        if not is_shared or self._has_overtaken or not answers or self.waiting.has_started_answers:
            return []
        turn = min(self.waiting.virtual_time(one) for one in answers)
        budget, segments = self._prefill_budget(len(answers)), list[Segment]()
        for request in [one for one in self._prompts(may_send) if self.waiting.virtual_time(one) < turn]:
            self._prefill(request, budget, segments)
        self._admit_before(turn, budget, segments, may_send)
        return segments

    def _unanswered(self) -> list[Request]:
        """The requests whose token is awaited before anything else is computed: none with several micro-batches."""
        if self._batching.num_micro_batches > 1:
            return []
        return [request for request in self.running.values() if not request.remaining]

    def _waits_for(self, requests: Sequence[Request]) -> bool:
        """Whether the next pass waits for a token of these; nobody waits for next shards that are late."""
        return any(not self._is_late(request.next_shards) for request in requests)

    def _may_send(self, request: Request) -> bool:
        """Whether the request has tokens to compute, and its next shard has room."""
        return request.remaining > 0 and self._has_room(request.next_shards)

    def _may_send_to_others(self, request: Request) -> bool:
        """`_may_send`, but not to the next shards that are late."""
        return self._may_send(request) and not self._is_late(request.next_shards)

    def _prompts(self, may_send: Callable[[Request], bool]) -> list[Request]:
        """The running requests with prompt tokens to compute, by the turn of their tenants."""
        prompts = [one for one in self.running.values() if not one.is_decoding and may_send(one)]
        return sorted(prompts, key=self.waiting.turn_of) if len(prompts) > 1 else prompts

    def _decode_segments(self, decoding: Sequence[Request], may_send: Callable[[Request], bool]) -> list[Segment]:
        """One token for each request of the next micro-batch."""
        ready = [request for request in decoding if may_send(request)]
        ready.sort(key=lambda request: request.last_pass)
        micro_batch = ready[: -(-len(decoding) // self._batching.num_micro_batches)]
        segments: list[Segment] = []
        for request in micro_batch:
            # An earlier one of this pass may have preempted it.
            if request.status is RequestStatus.RUNNING:
                self._schedule(request, 1, segments)
        return segments

    def _prefill_budget(self, num_decoding: int) -> PrefillBudget:
        """The budget of a pass with `num_decoding` decoding requests; together they fill whole tiles of rows."""
        most, share = self._batching.max_num_batched_tokens, self._batching.prefill_budget_while_decoding
        if not num_decoding:
            return PrefillBudget(most)
        num_prompts = len(self.waiting) + len(self.running) - num_decoding
        shares = num_prompts + num_decoding // DECODES_PER_EXTRA_SHARE
        tokens = max(share, min(most - num_decoding % TILE_ROWS, share * shares))
        return PrefillBudget(tokens, self._attention_cost_per_token)

    def _prefill(self, request: Request, budget: PrefillBudget, segments: list[Segment]) -> None:
        """Appends the request's next chunk, unless the budget is exhausted."""
        if budget.is_exhausted:
            return
        kv_length = request.cached
        affordable = min(budget.tokens_at(kv_length), self._max_chunk(request))
        budget.spend(self._schedule(request, max(affordable, self._min_chunk(request)), segments), kv_length)

    def _max_chunk(self, request: Request) -> int:
        """The end of a long prompt that has the shard to itself is halved.

        While the next shards compute the last chunk, this one is idle.
        """
        most = self._batching.max_prefill_chunk
        is_alone = len(self.running) + len(self.waiting) == 1
        is_end = request.reused < request.cached and request.remaining <= most
        return most // 2 if is_alone and is_end and most // 2 >= self._min_efficient_tokens else most

    def _min_chunk(self, request: Request) -> int:
        """The tokens that the next pass must hold, whatever the budget: all that the route probe reads."""
        return min(self._probe_tokens, request.prompt_tokens) if request.awaits_route else 1

    def _admit_before(
        self, turn: float, budget: PrefillBudget, segments: list[Segment], may_send: Callable[[Request], bool]
    ) -> None:
        """Admits waiting requests whose turn comes before `turn`, each with its first chunk."""
        while (admitted := self._admit(turn, budget, may_send)) is not None:
            self._prefill(admitted, budget, segments)

    def _admit(self, before: float, budget: PrefillBudget, may_send: Callable[[Request], bool]) -> Request | None:
        """The next waiting request, now running, if the budget and the KV blocks allow its first chunk."""
        if budget.is_exhausted or not self.waiting:
            return None
        request = self.waiting.next(before, lambda request: may_send(request) and self._has_kv_downstream(request))
        if request is None or not budget.affords(self._min_chunk(request)):
            return None
        # Cached prefixes belong to a route; and the probe reads hidden states that must be computed in this pass.
        hashes = [] if request.awaits_route else self._prefix_hashes(request)
        reused = 0 if request.skip_prefix_cache else self._pool.count_cached(hashes)
        if not self._pool.has_room(request.expected_tokens):
            return None
        self.waiting.take(request)
        self._kept.begin(request, hashes, reused, request.expected_tokens)
        if not request.awaits_route:
            self._credit.open(request)
        request.cached = request.reused = reused * self._pool.block_tokens
        request.status = RequestStatus.RUNNING
        self.running[request.id] = request
        if request.first_scheduled_at is None:
            request.first_scheduled_at = self._clock()
        return request

    def _has_kv_downstream(self, request: Request) -> bool:
        """Whether the next shard has KV room for the request: on any route, while it awaits one."""
        known, left = len(request.token_ids), request.sampling.max_tokens - request.generated
        # An answer that is longer than most will have half as many tokens again.
        growth = max(1, min(left, max(int(self._answer_tokens) - request.generated, request.generated // 2)))
        request.expected_tokens = min(known + growth, request.context_length)
        chains = request.candidates.values() or [request.chain]
        return all(self._credit.has_room(chain, request.expected_tokens) for chain in chains)

    def _learn_length(self, request: Request) -> None:
        """Takes the length of an answer into the mean."""
        self._answer_tokens += ANSWER_WEIGHT * (request.generated - self._answer_tokens)

    def _schedule(self, request: Request, most: int, segments: list[Segment]) -> int:
        """Appends the request's next tokens, at most `most`; returns how many, 0 where it was preempted."""
        length = min(request.remaining, most)
        if not self._grow(request, request.cached + length, segments):
            return 0
        segments.append(
            Segment(
                session=request,
                layers=self._common_layers if request.awaits_route else self._layer_ranges[request.route],
                position=request.cached,
                length=length,
                wants_token=length == request.remaining,
                blocks=self._pool.blocks_of(request.id),
                candidates=tuple(request.candidates),
            )
        )
        request.cached += length
        request.last_pass = self._passes
        self.waiting.charge(request, length * self._route_costs.get(request.route, self._lowest_cost))
        return length

    def _grow(self, request: Request, tokens: int, segments: list[Segment]) -> bool:
        """Preempts the youngest requests until `request` has room; False where it was itself the youngest."""
        while not self._pool.grow(request.id, tokens):
            youngest = next(reversed(self.running.values()))
            # Its segment of this pass would write into blocks that are free now.
            segments[:] = [segment for segment in segments if segment.session is not youngest]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def _prefix_hashes(self, request: Request) -> list[bytes]:
        return self._pool.hashes(request.tenant, request.route, request.token_ids[: request.prompt_tokens])
