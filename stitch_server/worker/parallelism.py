"""How a pass uses the CPU: on how many threads, and in how many micro-batches that are computed at the same time.

`ParallelismTuner.choose` takes the shape of a pass and returns the `Parallelism` that was fastest for such passes;
`record` tells it how long the pass took. `MicroBatchPool.run` splits a batch accordingly. The parallelism changes the
speed of a pass, never its result.

More threads are not always faster: a helper thread has to be woken for each pass, or, in a library's matmul, for each
matmul, and another process may need the cores. Micro-batches synchronize only at the end of a pass, so they use a core
whenever one is free, but each of them reads all weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from threading import Condition
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stitch_server.engine.types import Batch, Segment
from stitch_server.model.decoder import DecoderLayers

Result = TypeVar("Result")

# After this many passes of one kind each candidate is tried again; then after twice as many, and so on up to the
# maximum interval, at which the trials don't show in the p95 latency. The first trials may all have been disturbed by
# the start of another process. A dominated candidate is tried again at the first and at the maximum interval only.
FIRST_RETRIAL_PASSES = 16
MAX_RETRIAL_PASSES = 256
# Trials of each candidate at first. A candidate is dominated, and not tried a third time, if its best of two takes
# DOMINATED_RATIO times another one's best. One trial is never enough: the first pass fills caches.
INITIAL_TRIALS = 3
DOMINATED_RATIO = 1.3
# The tokens whose compute takes as long as reading the weights.
WEIGHT_READ_TOKENS = 16
# A candidate is compared by its most recent passes.
RECENT_PASSES = 5
# The smallest micro-batch: each reads all weights, so fewer tokens don't pay.
MIN_TOKENS_PER_MICRO_BATCH = 4
# The same for compiled layers, whose threads share each layer's tasks without micro-batches. From this size on they are
# faster apart, since no thread has to wait for what another writes, or to fetch it from another core's cache.
MIN_TOKENS_PER_COMPILED_MICRO_BATCH = 64
# How much a micro-batch of whole sequences may exceed its share of the tokens.
MAX_IMBALANCE = 1.125


class Parallelism(NamedTuple):
    """The number of micro-batches of a pass, and the threads that each of them has."""

    num_micro_batches: int
    threads: int


class PassShape(NamedTuple):
    """The properties of a pass that its duration depends on."""

    tokens: int
    # The attention's cost in tokens: as many take as long in all other operations.
    attention_tokens: float = 0.0
    # Whether another shard on this machine may compute at the same time, and whether the pass can be split.
    pipelined: bool = False
    splittable: bool = False

    @classmethod
    def of(cls, batch: Batch, decoder: DecoderLayers, device: torch.device) -> PassShape:
        """The shape of a batch's pass through `decoder`."""
        attended = sum(one.length * (one.position + one.length) for one in batch.segments)
        compiled = decoder.is_compiled(batch.num_tokens)
        min_tokens = MIN_TOKENS_PER_COMPILED_MICRO_BATCH if compiled else MIN_TOKENS_PER_MICRO_BATCH
        # Decode is bound by reading the weights, so a batch of single tokens is never split.
        min_tokens = max(min_tokens, len(batch.segments))
        splittable = device.type == "cpu" and batch.num_tokens >= 2 * min_tokens
        if splittable and compiled:
            # Micro-batches that depend on each other would call the compiled loop layer by layer.
            splittable = split_by_sequence(batch.segments, 2) is not None
        return cls(batch.num_tokens, attended / decoder.attention_cost_per_token, batch.pipelined, splittable)

    @property
    def kind(self) -> tuple[bool, bool, int]:
        """Equal for passes whose durations are compared: those of about as many tokens."""
        return self.pipelined, self.splittable, self.tokens.bit_length()

    @property
    def cost(self) -> float:
        """The work of the pass in tokens; durations are compared per unit of it."""
        return self.tokens + self.attention_tokens + WEIGHT_READ_TOKENS


class _Trials:
    """The candidates for passes of one kind, and how long their recent passes took."""

    def __init__(self, candidates: Sequence[Parallelism]) -> None:
        self._passes, self._retrial = 0, FIRST_RETRIAL_PASSES
        # Seconds per unit of cost.
        self._times = {one: deque[float](maxlen=RECENT_PASSES) for one in candidates}

    def choose(self, excluded: Collection[Parallelism]) -> Parallelism:
        """For the next pass; `excluded` candidates get no initial trials."""
        self._passes += 1
        retried = self._passes - self._retrial - 1
        if retried >= len(self._times):
            self._retrial += min(self._retrial, MAX_RETRIAL_PASSES)
        elif retried >= 0 and self._is_retried(candidate := list(self._times)[retried]):
            return candidate
        # The least tried candidate first, so that all are tried under the same conditions.
        initial = [one for one in self._times if one not in excluded] or list(self._times)
        untried = [one for one in initial if len(self._times[one]) < INITIAL_TRIALS and not self._is_dominated(one)]
        if untried:
            return min(untried, key=lambda one: len(self._times[one]))
        # By medians, since any pass may be disturbed.
        return min((one for one in self._times if self._times[one]), key=lambda one: median(self._times[one]))

    def record(self, parallelism: Parallelism, seconds_per_cost: float) -> None:
        self._times[parallelism].append(seconds_per_cost)

    @property
    def dominated(self) -> list[Parallelism]:
        """Candidates whose every recent pass took much longer than another's best."""
        return [one for one in self._times if self._is_dominated(one)]

    def _is_retried(self, parallelism: Parallelism) -> bool:
        first_or_rare = not FIRST_RETRIAL_PASSES < self._retrial < MAX_RETRIAL_PASSES
        return first_or_rare or not self._is_dominated(parallelism)

    def _is_dominated(self, parallelism: Parallelism) -> bool:
        times, best = self._times[parallelism], [min(times) for times in self._times.values() if times]
        return len(times) > 1 and min(times) > DOMINATED_RATIO * min(best)


class ParallelismTuner:
    """Chooses pass by pass among all threads, a quarter of them, one, and two micro-batches that share all of them."""

    def __init__(self, threads: int, threads_while_pipelined: int) -> None:
        """The maximum threads of a pass, and of one that is computed while another shard computes on this machine."""
        self._max_threads = {False: threads, True: threads_while_pipelined}
        self._kinds: dict[tuple[bool, bool, int], _Trials] = {}

    def choose(self, shape: PassShape) -> Parallelism:
        """The parallelism of a pass that is about to run."""
        pipelined, splittable, size = shape.kind
        # Passes of about half and of about twice as many tokens.
        similar = [self._kinds.get((pipelined, splittable, one)) for one in (size - 1, size + 1)]
        excluded = {candidate for trials in similar if trials is not None for candidate in trials.dominated}
        return self._trials(shape).choose(excluded)

    def record(self, shape: PassShape, parallelism: Parallelism, seconds: float) -> None:
        """Notes the duration of a pass."""
        self._trials(shape).record(parallelism, seconds / shape.cost)

    def _trials(self, shape: PassShape) -> _Trials:
        if shape.kind not in self._kinds:
            self._kinds[shape.kind] = _Trials(_candidates(self._max_threads[shape.pipelined], shape.splittable))
        return self._kinds[shape.kind]


def _candidates(max_threads: int, splittable: bool) -> list[Parallelism]:
    split = {Parallelism(2, max_threads // 2)} if splittable and max_threads > 1 else set()
    whole = {Parallelism(1, max_threads), Parallelism(1, max(1, max_threads // 4)), Parallelism(1, 1)}
    return sorted(split | whole, reverse=True)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some segments of a batch, and the rows of the batch that are theirs."""

    segments: list[Segment]
    rows: list[int]


def split(segments: Sequence[Segment], num_micro_batches: int) -> list[MicroBatch]:
    """Splits a batch into micro-batches of about as many tokens: whole sequences, or else consecutive tokens.

    The tokens of a micro-batch are in the batch's order.
    """
    return split_by_sequence(segments, num_micro_batches) or _split_by_token(segments, num_micro_batches)


def split_by_sequence(segments: Sequence[Segment], num_micro_batches: int) -> list[MicroBatch] | None:
    """Micro-batches of whole sequences, which are independent; None if one would exceed its share by too much."""
    lengths: dict[int, int] = {}
    for segment in segments:
        lengths[segment.session.id] = lengths.get(segment.session.id, 0) + segment.length
    sizes, assigned = [0] * num_micro_batches, dict[int, int]()
    # Long sequences first, so that short ones balance the sizes.
    for sequence in sorted(lengths, key=lambda session_id: -lengths[session_id]):
        assigned[sequence] = smallest = sizes.index(min(sizes))
        sizes[smallest] += lengths[sequence]
    if max(sizes) * num_micro_batches > MAX_IMBALANCE * sum(sizes):
        return None
    micro_batches = [MicroBatch([], []) for _ in range(num_micro_batches)]
    row = 0
    for segment in segments:
        micro_batch = micro_batches[assigned[segment.session.id]]
        micro_batch.segments.append(segment)
        micro_batch.rows.extend(range(row, row + segment.length))
        row += segment.length
    return micro_batches


def _split_by_token(segments: Sequence[Segment], num_micro_batches: int) -> list[MicroBatch]:
    """Micro-batches of equally many consecutive tokens; a segment on a boundary is cut in two."""
    tokens = sum(segment.length for segment in segments)
    micro_batches = [MicroBatch([], []) for _ in range(num_micro_batches)]
    row = 0
    for segment in segments:
        done = 0
        while done < segment.length:
            index = row * num_micro_batches // tokens
            next_start = -(-(index + 1) * tokens // num_micro_batches)
            length = min(segment.length - done, next_start - row)
            piece = replace(segment, position=segment.position + done, length=length)
            micro_batches[index].segments.append(piece)
            micro_batches[index].rows.extend(range(row, row + length))
            done, row = done + length, row + length
    return micro_batches


def share_a_sequence(micro_batches: Sequence[MicroBatch]) -> bool:
    """Whether two micro-batches hold tokens of one sequence, so that the later one attends to KV of the earlier one."""
    sequences = [{segment.session.id for segment in one.segments} for one in micro_batches]
    return sum(map(len, sequences)) > len(set().union(*sequences))


class LayerBarrier:
    """Holds a micro-batch back at each layer until its predecessor, with earlier tokens, has computed the layer."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._completed = 0
        self._released = False

    def complete(self, layer: int) -> None:
        """The predecessor has computed all layers before `layer`."""
        with self._changed:
            self._completed = layer
            self._changed.notify_all()

    def release(self) -> None:
        """The predecessor has ended, by finishing or by failing."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def wait_for(self, layer: int) -> None:
        """Returns once all layers before `layer` are computed, or the predecessor has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._released or self._completed >= layer)


# Segments, their hidden states, the barrier of the predecessor and that of the successor: to the layers' output.
ComputeLayers = Callable[[Sequence[Segment], Tensor, LayerBarrier | None, LayerBarrier | None], Tensor]


class MicroBatchPool:
    """Computes the micro-batches of a pass, each on a thread of its own."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    def run(
        self, compute: ComputeLayers, parallelism: Parallelism, segments: Sequence[Segment], hidden: Tensor
    ) -> Tensor:
        """`compute` over all segments and their hidden states `[tokens, hidden]`, split as `parallelism` says."""
        if parallelism.num_micro_batches == 1 or len(hidden) < parallelism.num_micro_batches:
            return compute(segments, hidden, None, None)
        micro_batches = split(segments, parallelism.num_micro_batches)
        # A batch is in layer order, so a micro-batch passes every layer that its successors pass.
        barriers = [LayerBarrier() if share_a_sequence(micro_batches) else None for _ in micro_batches[1:]]
        neighbours = zip(micro_batches, [None, *barriers], [*barriers, None], strict=True)
        tasks = [
            partial(_compute_one, compute, parallelism.threads, one, hidden[one.rows], predecessor, successor)
            for one, predecessor, successor in neighbours
        ]
        output = torch.empty_like(hidden)
        for one, computed in zip(micro_batches, self.run_tasks(tasks), strict=True):
            output[one.rows] = computed
        return output

    def run_tasks(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of all tasks, the first of them run by the calling thread; raises the first task's error."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="micro-batch")
        others = [self._threads.submit(task) for task in tasks[1:]]
        try:
            first = tasks[0]()
        finally:
            # No task may still write KV when the next pass begins.
            wait(others)
        return [first, *(other.result() for other in others)]


def _compute_one(
    compute: ComputeLayers,
    threads: int,
    micro_batch: MicroBatch,
    hidden: Tensor,
    predecessor: LayerBarrier | None,
    successor: LayerBarrier | None,
) -> Tensor:
    set_threads(threads)
    try:
        # The inference mode is a property of the thread.
        with torch.inference_mode():
            return compute(micro_batch.segments, hidden, predecessor, successor)
    finally:
        if successor is not None:
            successor.release()


def set_threads(threads: int) -> None:
    """Sets the number of threads that operations of the calling thread use."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
