"""One forward pass: takes a batch of segments, returns hidden states for the next shard, sampled tokens, or both.

A pass embeds token ids, or maps received hidden states by the routes' stitches, runs the shard's layers, and where
routes end applies the head and samples. All routes share the batch: on a bottom shard every segment starts at the first
layer and ends at its route's cut, on a top shard it enters at its route's cut and ends at the last layer. The segments
are in layer order, so the tokens of any layer are the leading rows of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from stitch.grammar import InvalidGrammar
from stitch.sampling import Token
from stitch.v1 import shard_pb2
from stitch_server.attention import AttentionBackend, BatchAttention, Rotary, leading
from stitch_server.devices import to_device_async
from stitch_server.engine.types import Batch, LayerRange, RouteDecision, Segment, SessionRefused, StepOutput
from stitch_server.kv_cache.store import Span
from stitch_server.model.adapters import Adapters
from stitch_server.model.constraint import Forbidden, Masks
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.ffn_skip import FfnSkip, Skipping
from stitch_server.model.sampler import SampleRequest, sample
from stitch_server.worker.cuda_graphs import DecodeGraphs
from stitch_server.worker.kept_pass import run_after_kept
from stitch_server.worker.parallelism import (
    LayerBarrier,
    MicroBatchPool,
    Parallelism,
    ParallelismTuner,
    PassShape,
    set_threads,
)
from stitch_server.worker.route_probe import RouteProbe, decide_inside_pass

# The masks by index of the segment, and the sessions that can't have one.
_Masks = tuple[dict[int, Forbidden], dict[int, SessionRefused]]


@dataclass(slots=True)
class ModelRunner:
    """The loaded layers of one shard, with everything that a pass through them needs."""

    decoder: DecoderLayers
    attention: AttentionBackend
    device: torch.device
    tuner: ParallelismTuner
    # Token ids to hidden states, of segments that come without any.
    embed: Callable[[Tensor], Tensor] | None = None
    # The name of these layers' time in the breakdown of the TTFT.
    stage: str = "bottom_prefill"
    # By route that enters the top model here through a stitch: the bottom's hidden states, and the rows of sequences'
    # first tokens, to the top's hidden states.
    stitches: Mapping[str, Callable[[Tensor, Sequenced[int]], Tensor]] = field(default_factory=dict)
    # By route whose stitch adapts these layers.
    adapters: Mapping[str, Adapters] = field(default_factory=dict)
    # By route whose generated tokens leave out FFNs of these layers.
    ffn_skips: Mapping[str, FfnSkip] = field(default_factory=dict)
    # Hidden states to logits, where the routes `ending` end.
    head: Callable[[Tensor], Tensor] | None = None
    ending: frozenset[str] = frozenset()
    # On a first shard with a probe, which needs the layers that each route passes here.
    probe: RouteProbe | None = None
    layer_ranges: Mapping[str, LayerRange] = field(default_factory=dict)
    # On a GPU: the graphs of decode steps, and a function that waits for all queued kernels.
    graphs: DecodeGraphs | None = None
    synchronize: Callable[[], None] | None = None
    micro_batches: MicroBatchPool = field(default_factory=MicroBatchPool)
    masks: Masks = field(default_factory=Masks)
    # Seconds spent in `run` so far.
    busy_seconds: float = 0.0

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """One pass over all segments of `batch`."""
        shape = PassShape.of(batch, self.decoder, self.device)
        parallelism = self.tuner.choose(shape)
        started = time.perf_counter()
        masks = self._begin_masks(batch.segments)
        set_threads(parallelism.threads)
        hidden, non_finite = self._embed_or_stitch(batch.segments)
        stitched = time.perf_counter()
        hidden, decisions = self._run_layers(batch.segments, hidden, parallelism)
        self._synchronize_prefill(batch)
        stages = {self.stage: time.perf_counter() - stitched}
        if self.stitches:
            stages["stitch"] = stitched - started
        tokens: dict[int, Token] = {}
        refused: dict[int, SessionRefused] = {}
        ending = self._ending(batch.segments, decisions)
        if self.head is not None and ending:
            forbidden, without_mask = masks()
            refused = {index: reason for index, reason in without_mask.items() if index in ending}
            without = {*non_finite, *refused}
            wanting = [index for index in ending if batch.segments[index].wants_token and index not in without]
            tokens = self._sample(self.head, batch.segments, wanting, hidden, non_finite, forbidden, stages)
        seconds = time.perf_counter() - started
        # Tokens with kept states take less time than others.
        if all(segment.kept is None for segment in batch.segments):
            self.tuner.record(shape, parallelism, seconds)
        self.busy_seconds += seconds
        leaves = len(ending) < len(batch.segments)
        return StepOutput(hidden if leaves else None, tokens, non_finite, refused, stages, decisions)

    def _ending(self, segments: Sequenced[Segment], decisions: Mapping[int, RouteDecision]) -> list[int]:
        """The indices of the segments whose route ends on this shard."""
        routes = (one.session.route for one in segments)
        return [i for i, route in enumerate(routes) if (decisions[i].route if i in decisions else route) in self.ending]

    def _begin_masks(self, segments: Sequenced[Segment]) -> Callable[[], _Masks]:
        """Fills the masks of the grammars in another thread; the function waits for them."""
        constraints = {
            index: one.session.constraint
            for index, one in enumerate(segments)
            if one.wants_token and one.session.constraint is not None
        }
        if not constraints:
            return lambda: ({}, {})
        filling = self.masks.begin(list(constraints.values()))
        return lambda: _by_outcome(dict(zip(constraints, filling.result(), strict=True)))

    def _embed_or_stitch(self, segments: Sequenced[Segment]) -> tuple[Tensor, dict[int, str]]:
        """The first layers' input `[tokens, hidden]`, and the segments with non-finite hidden states."""
        if self.embed is not None and segments[0].hidden is None:
            ids = [id_ for one in segments for id_ in one.session.token_ids[one.position : one.position + one.length]]
            return self.embed(to_device_async(torch.tensor(ids), self.device)), {}
        stitched: list[Tensor] = []
        non_finite: dict[int, str] = {}
        index = 0
        # One route at a time, since hidden states from different models have different widths.
        for route, group in groupby(segments, key=lambda segment: segment.session.route):
            members = list(group)
            received = _concatenate([_hidden_of(segment) for segment in members])
            found = _find_non_finite(received, [one.length for one in members])
            non_finite |= {index + offset: "hidden states" for offset in found}
            index += len(members)
            stitch = self.stitches.get(route)
            stitched.append(received if stitch is None else stitch(received, _first_token_rows(members)))
        return _concatenate(stitched), non_finite

    def _run_layers(
        self, segments: Sequenced[Segment], hidden: Tensor, parallelism: Parallelism
    ) -> tuple[Tensor, dict[int, RouteDecision]]:
        """The layers' output `[tokens, hidden]`, and the route decisions by segment index."""
        run_layers = partial(self.micro_batches.run, self._run_micro_batch, parallelism)
        if any(segment.kept is not None for segment in segments):
            others = partial(self._run_layers, parallelism=parallelism)
            return run_after_kept(run_layers, others, segments, hidden)
        if self.probe is None or not any(segment.candidates for segment in segments):
            return run_layers(segments, hidden), {}
        return decide_inside_pass(self.probe, self.layer_ranges, run_layers, segments, hidden)

    def _run_micro_batch(
        self,
        segments: Sequenced[Segment],
        hidden: Tensor,
        predecessor: LayerBarrier | None,
        successor: LayerBarrier | None,
    ) -> Tensor:
        """Through all layers of the segments; no layer runs before `predecessor` has completed it."""
        inputs = _LayerInputs(self.decoder, self.attention, self.device, segments)
        bounds = sorted({one.layers.first for one in segments} | {one.layers.end for one in segments})
        if predecessor is not None or successor is not None:
            bounds = list(range(bounds[0], bounds[-1] + 1))
        for first, end in pairwise(bounds):
            present = [one for one in segments if one.layers.first <= first and one.layers.end >= end]
            tokens = sum(one.length for one in present)
            if predecessor is not None:
                predecessor.wait_for(end)
            if len(present) == len(segments):
                hidden = self._run_layer_range(inputs, present, hidden, first, end)
            else:
                moved = self._run_layer_range(inputs, present, hidden[:tokens], first, end)
                hidden = torch.cat([moved, hidden[tokens:]])
            if successor is not None:
                successor.complete(end)
        return hidden

    def _run_layer_range(
        self, inputs: _LayerInputs, segments: Sequenced[Segment], hidden: Tensor, first: int, end: int
    ) -> Tensor:
        """Layers `first` to `end` over the leading segments: as a CUDA graph, compiled, or layer by layer."""
        adapted = self._adapted_rows(segments)
        if skipping := self._skipping_rows(segments):
            attention = inputs.attention(len(segments))
            return self.decoder.run(
                hidden, leading(inputs.rotary, len(hidden)), attention, first, end, adapted, skipping
            )
        if self.graphs is not None:
            rotary = leading(inputs.rotary, len(hidden))
            replayed = self.graphs.run(inputs.spans[: len(segments)], hidden, rotary, first, end, adapted)
            if replayed is not None:
                return replayed
        attention = inputs.attention(len(segments))
        if attention.paged_kv is not None and self.decoder.is_compiled(len(hidden)):
            return self.decoder.run_compiled(hidden, attention.paged_kv, first, end, adapted)
        return self.decoder.run(hidden, leading(inputs.rotary, len(hidden)), attention, first, end, adapted)

    def _adapted_rows(self, segments: Sequenced[Segment]) -> list[tuple[slice, Adapters]]:
        """The rows of each route that has adapters here; a route's segments are adjacent in layer order."""
        adapted, row = [], 0
        for route, group in groupby(segments, key=lambda segment: segment.session.route):
            end = row + sum(segment.length for segment in group)
            if (adapters := self.adapters.get(route)) is not None:
                adapted.append((slice(row, end), adapters))
            row = end
        return adapted

    def _skipping_rows(self, segments: Sequenced[Segment]) -> Skipping:
        """The rows of generated tokens, also of those that a replay computes again, by route that leaves out FFNs."""
        by_route, begin = dict[str, list[int]](), 0
        for one in segments:
            if one.session.route in self.ffn_skips:
                prompt_rows = min(max(one.session.prompt_tokens - one.position, 0), one.length)
                by_route.setdefault(one.session.route, []).extend(range(begin + prompt_rows, begin + one.length))
            begin += one.length
        return [
            (to_device_async(torch.tensor(rows), self.device), self.ffn_skips[route])
            for route, rows in by_route.items()
            if rows
        ]

    def _synchronize_prefill(self, batch: Batch) -> None:
        """Waits for a GPU, so that the stages of a prefill are its real durations.

        Without a head the hidden states are waited for anyway, to be sent. A decode step on a shard with one waits for
        what leaves the GPU: sampled tokens, and hidden states.
        """
        if self.synchronize is not None and (self.head is None or batch.num_tokens > len(batch.segments)):
            self.synchronize()

    @staticmethod
    def _sample(
        head: Callable[[Tensor], Tensor],
        segments: Sequenced[Segment],
        wanting: list[int],
        hidden: Tensor,
        non_finite: dict[int, str],
        forbidden: Mapping[int, Forbidden],
        stages: dict[str, float],
    ) -> dict[int, Token]:
        """The tokens by index of the segments `wanting` one.

        Adds the sampling's seconds to `stages`, and segments without finite logits to `non_finite`.
        """
        started = time.perf_counter()
        ends = list(accumulate(segment.length for segment in segments))
        if not wanting:
            return {}
        last_rows = torch.tensor([ends[index] - 1 for index in wanting])
        logits = head(hidden[to_device_async(last_rows, hidden.device)])
        if broken := _find_non_finite(logits, [1] * len(wanting)):
            non_finite |= {wanting[row]: "logits" for row in broken}
            finite = [row for row in range(len(wanting)) if row not in broken]
            logits, wanting = logits[finite], [wanting[row] for row in finite]
        sampled = sample(logits, [_sample_request(segments[index], forbidden.get(index)) for index in wanting])
        stages["sample"] = time.perf_counter() - started
        return dict(zip(wanting, sampled, strict=True))


class _LayerInputs:
    """What a micro-batch's layers read beside its hidden states.

    Made on first use: compiled layers rotate by themselves, and CUDA graphs bring their own attention.
    """

    def __init__(
        self, decoder: DecoderLayers, backend: AttentionBackend, device: torch.device, segments: Sequenced[Segment]
    ) -> None:
        self.spans = [Span(one.position, one.length, one.blocks) for one in segments]
        self._decoder, self._backend, self._device = decoder, backend, device
        self._leading: dict[int, BatchAttention] = {}

    @cached_property
    def rotary(self) -> Rotary:
        positions = torch.tensor([at for span in self.spans for at in range(span.position, span.end)])
        return self._decoder.rotary(to_device_async(positions, self._device))

    def attention(self, segments: int) -> BatchAttention:
        """The attention of the leading `segments`."""
        if segments not in self._leading:
            whole = segments == len(self.spans)
            self._leading[segments] = self._whole if whole else self._whole.leading(segments)
        return self._leading[segments]

    @cached_property
    def _whole(self) -> BatchAttention:
        return self._backend(self.spans)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _first_token_rows(segments: Sequenced[Segment]) -> list[int]:
    """The rows that hold the first token of a sequence."""
    rows = accumulate((one.length for one in segments), initial=0)
    return [row for row, one in zip(rows, segments, strict=False) if one.position == 0]


def _hidden_of(segment: Segment) -> Tensor:
    if segment.hidden is None:
        raise ValueError("a segment without hidden states reached a shard without an embedding")
    return segment.hidden


def _find_non_finite(values: Tensor, lengths: list[int]) -> list[int]:
    """Indices of the segments of rows with a non-finite value. Others are not affected: no token attends to those."""
    # A sum is non-finite if any of its terms is, and takes one pass over the memory.
    if math.isfinite(float(values.float().sum())):
        return []
    by_segment = torch.split(values, lengths)
    return [index for index, rows in enumerate(by_segment) if not bool(torch.isfinite(rows).all())]


def _by_outcome(masks: Mapping[int, Forbidden | InvalidGrammar | None]) -> _Masks:
    """The masks by index of the segment, and the sessions that have none."""
    forbidden, refused = dict[int, Forbidden](), dict[int, SessionRefused]()
    for index, mask in masks.items():
        if mask is None:
            refused[index] = SessionRefused(shard_pb2.FAILURE_CAUSE_NOT_COMPILED, "the grammar is still being compiled")
        elif isinstance(mask, InvalidGrammar):
            refused[index] = SessionRefused(shard_pb2.FAILURE_CAUSE_PRECONDITION, f"the grammar fails: {mask}")
        else:
            forbidden[index] = mask
    return forbidden, refused


def _sample_request(segment: Segment, forbidden: Forbidden | None) -> SampleRequest:
    session = segment.session
    return SampleRequest(
        sampling=session.sampling,
        position=segment.position + segment.length,
        history=session.token_ids,
        prompt_tokens=session.prompt_tokens,
        forbidden=forbidden,
    )
