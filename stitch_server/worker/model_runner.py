"""Computes one batch: the only part of the engine that touches tensors. Knows neither sessions' owners nor links.

All routes share the batch. On a bottom shard every token starts at the first layer and a route's tokens leave at its
cut; on a top shard a route's tokens join at its cut and all go to the last layer. Since a batch is `ordered`, the
tokens of any layer are its leading rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from stitch_server.attention import AttentionBackend, Rotary, leading
from stitch_server.devices import to_device_async
from stitch_server.engine.types import Batch, LayerRange, RouteDecision, Segment, StepOutput, Token, TokenLogprobs
from stitch_server.kv_cache.span import Span
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.sampler import SampledToken, SampleRequest, sample
from stitch_server.worker.cuda_graphs import DecodeGraphs
from stitch_server.worker.micro_batches import KERNEL_LANE_ROWS, LANE_ROWS, Lanes, Turns, apart, depend, divided
from stitch_server.worker.parallelism import Parallelism, ParallelismTuner, PassShape
from stitch_server.worker.route_probe import RouteProbe


@dataclass(slots=True)
class ModelRunner:
    """A shard's part of the pair, ready to compute."""

    decoder: DecoderLayers
    attention: AttentionBackend
    device: torch.device
    threads: ParallelismTuner
    # On the first shard: token ids to hidden states.
    embed: Callable[[Tensor], Tensor] | None = None
    # What a pass through these layers counts as in the breakdown of the TTFT.
    stage: str = "bottom_prefill"
    # By the route that enters the top model here through a stitch: the bottom's hidden states, and which rows begin a
    # sequence, to the top's.
    stitches: Mapping[str, Callable[[Tensor, Sequenced[int]], Tensor]] = field(default_factory=dict)
    # By route: what its tokens pass beside these layers, where its stitch brings adapters.
    adapters: Mapping[str, Adapters] = field(default_factory=dict)
    # On the last shard: hidden states to logits.
    head: Callable[[Tensor], Tensor] | None = None
    # On a first shard that decides: who does, and the layers that each route then passes here.
    judge: RouteProbe | None = None
    layer_ranges: Mapping[str, LayerRange] = field(default_factory=dict)
    # On a GPU: passes of single tokens, captured; and what waits until all is computed that was asked for.
    graphs: DecodeGraphs | None = None
    wait: Callable[[], None] | None = None
    lanes: Lanes = field(default_factory=Lanes)
    # Seconds spent in `run` so far.
    busy_seconds: float = 0.0

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """One pass over all segments of `batch`."""
        work = self._work(batch)
        spread = self.threads.choose(work)
        started = time.perf_counter()
        _use(spread.threads)
        hidden, non_finite = self._entering(batch.segments)
        stitched = time.perf_counter()
        decisions: dict[int, RouteDecision] = {}
        if self.judge is not None and any(segment.candidates for segment in batch.segments):
            hidden, decisions = self._deciding(self.judge, batch.segments, hidden, spread)
        else:
            hidden = self._through_layers(batch.segments, hidden, spread)
        if self.wait is not None and (self.head is None or batch.num_tokens > len(batch.segments)):
            # So that stages of a prompt are what they took. Who sends the rows on waits anyway; a step of single tokens
            # waits once, for what is sampled.
            self.wait()
        stages = {self.stage: time.perf_counter() - stitched}
        if self.stitches:
            stages["stitch"] = stitched - started
        if self.head is None:
            output = StepOutput(hidden=hidden, non_finite=non_finite, stages=stages, decisions=decisions)
        else:
            tokens = self._tokens(self.head, batch.segments, hidden, non_finite, stages)
            output = StepOutput(tokens=tokens, non_finite=non_finite, stages=stages)
        seconds = time.perf_counter() - started
        self.threads.took(work, spread, seconds)
        self.busy_seconds += seconds
        return output

    def _work(self, batch: Batch) -> PassShape:
        seen = sum(one.length * (one.position + one.length) for one in batch.segments)
        attended = seen / self.decoder.attention_cost_per_token
        compiled = self.decoder.is_compiled(batch.num_tokens)
        # Lanes read all weights each, and single tokens are bound by just that.
        least = max(KERNEL_LANE_ROWS if compiled else LANE_ROWS, len(batch.segments))
        divisible = self.device.type == "cpu" and batch.num_tokens >= 2 * least
        if divisible and compiled:
            # Lanes that wait for each other would call the loop for each layer.
            divisible = apart(batch.segments, 2) is not None
        return PassShape(batch.num_tokens, attended, batch.pipelined, divisible)

    def _entering(self, segments: Sequenced[Segment]) -> tuple[Tensor, frozenset[int]]:
        """The batch's rows `[tokens, hidden]` as the first layers take them, and which segments are spoilt."""
        if self.embed is not None:
            ids = [
                token for one in segments for token in one.session.token_ids[one.position : one.position + one.length]
            ]
            return self.embed(to_device_async(torch.tensor(ids), self.device)), frozenset()
        parts: list[Tensor] = []
        non_finite: set[int] = set()
        index = 0
        # Rows of different routes may come from different models, and so have different widths.
        for route, group in groupby(segments, key=lambda segment: segment.session.route):
            members = list(group)
            received = _packed([_received(segment) for segment in members])
            non_finite.update(index + offset for offset in _non_finite(received, members))
            index += len(members)
            stitch = self.stitches.get(route)
            parts.append(received if stitch is None else stitch(received, _begins(members)))
        return _packed(parts), frozenset(non_finite)

    def _through_layers(self, segments: Sequenced[Segment], hidden: Tensor, spread: Parallelism) -> Tensor:
        if spread.lanes == 1 or len(hidden) < spread.lanes:
            return self._lane(segments, hidden)
        parts = divided(segments, spread.lanes)
        # The batch is ordered, so a lane passes every layer that those behind it pass.
        turns = [Turns() if depend(parts) else None for _ in parts[1:]]
        lanes = [
            partial(self._beside, spread.threads, part.segments, hidden[part.rows], follows, leads)
            for part, follows, leads in zip(parts, [None, *turns], [*turns, None], strict=True)
        ]
        moved = torch.empty_like(hidden)
        for part, rows in zip(parts, self.lanes.run(lanes), strict=True):
            moved[part.rows] = rows
        return moved

    def _beside(
        self, threads: int, segments: Sequenced[Segment], hidden: Tensor, follows: Turns | None, leads: Turns | None
    ) -> Tensor:
        """A lane beside others, in a thread of its own."""
        _use(threads)
        try:
            with torch.inference_mode():
                return self._lane(segments, hidden, follows, leads)
        finally:
            if leads is not None:
                leads.end()

    def _lane(
        self, segments: Sequenced[Segment], hidden: Tensor, follows: Turns | None = None, leads: Turns | None = None
    ) -> Tensor:
        """Through all layers; none before the lane that it `follows`, and each told to the one that it `leads`."""
        spans = [Span(one.position, one.length, one.blocks) for one in segments]
        # Made where they are asked for: kernels rotate by themselves, captured passes bring their own attention.
        rotary = cache(partial(self._rotary, spans))
        attention = cache(partial(self.attention, spans))
        attention_of = cache(lambda count: attention() if count == len(segments) else attention().leading(count))
        bounds = sorted({one.layers.first for one in segments} | {one.layers.end for one in segments})
        if follows is not None or leads is not None:
            bounds = list(range(bounds[0], bounds[-1] + 1))
        for first, end in pairwise(bounds):
            present = [one for one in segments if one.layers.first <= first and one.layers.end >= end]
            rows = sum(one.length for one in present)
            adapted = self._adapted(present)
            whole = len(present) == len(segments)
            here = hidden if whole else hidden[:rows]
            if follows is not None:
                follows.wait_for(end)
            moved = None
            if self.graphs is not None:
                moved = self.graphs.run(spans[: len(present)], here, leading(rotary(), rows), first, end, adapted)
            if moved is None:
                attend = attention_of(len(present))
                if attend.paged_kv is not None and self.decoder.is_compiled(rows):
                    moved = self.decoder.run_compiled(here, attend.paged_kv, first, end, adapted)
                else:
                    moved = self.decoder.run(here, leading(rotary(), rows), attend, first, end, adapted)
            hidden = moved if whole else torch.cat([moved, hidden[rows:]])
            if leads is not None:
                leads.reached(end)
        return hidden

    def _rotary(self, spans: Sequenced[Span]) -> Rotary:
        positions = torch.tensor([at for span in spans for at in range(span.position, span.end)])
        return self.decoder.rotary(to_device_async(positions, self.device))

    def _adapted(self, segments: Sequenced[Segment]) -> list[tuple[slice, Adapters]]:
        """The rows of every route that has adapters here: side by side, since batches are ordered."""
        found, row = [], 0
        for route, group in groupby(segments, key=lambda segment: segment.session.route):
            end = row + sum(segment.length for segment in group)
            if (adapters := self.adapters.get(route)) is not None:
                found.append((slice(row, end), adapters))
            row = end
        return found

    def _deciding(
        self, judge: RouteProbe, segments: Sequenced[Segment], hidden: Tensor, spread: Parallelism
    ) -> tuple[Tensor, dict[int, RouteDecision]]:
        """As `_through_layers`, but segments with candidates get their routes where the first ones leave.

        Up to there all segments pass the same layers, and then those that go on are gathered anew.
        """
        up_to = [replace(one, layers=LayerRange(one.layers.first, judge.layer)) for one in segments]
        hidden = self._through_layers(up_to, hidden, spread)
        rows = [0, *accumulate(one.length for one in segments)]
        decisions = {
            index: judge.judge(hidden[rows[index] : rows[index + 1]], one.candidates)
            for index, one in enumerate(segments)
            if one.candidates
        }
        leaves = [
            self.layer_ranges[decisions[index].route].end if index in decisions else one.layers.end
            for index, one in enumerate(segments)
        ]
        staying = sorted(
            (index for index, leave in enumerate(leaves) if leave > judge.layer), key=lambda index: -leaves[index]
        )
        if staying:
            taken = to_device_async(
                torch.cat([torch.arange(rows[index], rows[index + 1]) for index in staying]), self.device
            )
            onward = [replace(segments[index], layers=LayerRange(judge.layer, leaves[index])) for index in staying]
            hidden[taken] = self._through_layers(onward, hidden[taken], spread)
        return hidden, decisions

    @staticmethod
    def _tokens(
        head: Callable[[Tensor], Tensor],
        segments: Sequenced[Segment],
        hidden: Tensor,
        non_finite: frozenset[int],
        stages: dict[str, float],
    ) -> dict[int, Token]:
        started = time.perf_counter()
        last_rows, wanted, row = [], [], 0
        for index, segment in enumerate(segments):
            row += segment.length
            if segment.wants_token and index not in non_finite:
                last_rows.append(row - 1)
                wanted.append(index)
        if not wanted:
            return {}
        logits = head(hidden[to_device_async(torch.tensor(last_rows), hidden.device)])
        sampled = sample(logits, [_request(segments[index]) for index in wanted])
        stages["sample"] = time.perf_counter() - started
        return {index: _token(segments[index], drawn) for index, drawn in zip(wanted, sampled, strict=True)}


def _use(threads: int) -> None:
    """Of the calling thread's products."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _packed(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _begins(segments: Sequenced[Segment]) -> list[int]:
    """The rows that are a sequence's first token."""
    rows = accumulate((one.length for one in segments), initial=0)
    return [row for row, one in zip(rows, segments, strict=False) if one.position == 0]


def _received(segment: Segment) -> Tensor:
    if segment.hidden is None:
        raise ValueError("a segment without hidden states reached a shard that does not embed")
    return segment.hidden


def _non_finite(rows: Tensor, segments: Sequenced[Segment]) -> list[int]:
    """Segments that hold a value that is not finite. Attention keeps segments apart, so the others are sound."""
    # A sum is not finite if any of its terms isn't, and takes one pass.
    if math.isfinite(float(rows.float().sum())):
        return []
    parts = torch.split(rows, [segment.length for segment in segments])
    return [index for index, part in enumerate(parts) if not bool(torch.isfinite(part).all())]


def _request(segment: Segment) -> SampleRequest:
    sequence = segment.session
    return SampleRequest(
        sampling=sequence.sampling,
        position=segment.position + segment.length,
        history=sequence.token_ids,
        prompt_tokens=sequence.prompt_tokens,
    )


def _token(segment: Segment, drawn: SampledToken) -> Token:
    logprobs = None if drawn.logprob is None else TokenLogprobs(drawn.logprob, tuple(drawn.alternatives))
    return Token(drawn.id, segment.position + segment.length, logprobs)
