"""One pass over the data through both models: sums for least squares, a trace for distillation. Knows no stitch.

It can be interrupted at any point: what counts is the last checkpoint, and a resumed pass adds the same numbers in
the same order as one that never stopped. A pass can be taken up again for more sequences, and spares another one what
it computed of the bottom model; in float32 that one then counts states that were rounded to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_training.activation_cache import Known
from stitch_training.frozen_models import Pair, states_at, teacher_of
from stitch_training.packing import PackedSequence
from stitch_training.sums import Cut, Sums
from stitch_training.trace import Teacher, Trace, TraceShape

BATCH_SEQUENCES = 4
CHECKPOINT_BATCHES = 8
CHECKPOINT = "collected.safetensors"


@dataclass(frozen=True)
class Collected:
    """A finished pass: `sequences` of the trace count, `fingerprint` is of their tokens."""

    sums: Sums
    trace: Trace
    sequences: int
    fingerprint: str


@dataclass(frozen=True)
class Pass:
    """What a pass is over. Two passes with equal fields give equal results, but for what they recall of others."""

    name: str
    sequences: int
    sequence_tokens: int
    cuts: tuple[Cut, ...]
    # Whatever else decides the numbers: models, files, seed, dtype.
    settings: str


class Collector:
    """Adds batches of sequences to the sums and the trace of a folder."""

    def __init__(self, pair: Pair, whole: Pass, folder: Path, known: Known) -> None:
        self._pair, self._pass, self._known = pair, whole, known
        self.sums = Sums(whole.cuts, pair.bottom.hidden_size, pair.top.hidden_size)
        depths = self.sums.bottom_depths
        shape = TraceShape(whole.sequences, whole.sequence_tokens, pair.bottom.hidden_size, depths)
        self._checkpoint = folder / CHECKPOINT
        self.done, self.fingerprint = 0, hashlib.sha256(whole.settings.encode()).hexdigest()
        if self._checkpoint.exists():
            self._resume()
        self.trace = Trace(folder, shape)

    def _resume(self) -> None:
        with safe_open(self._checkpoint, "pt") as file:
            metadata = file.metadata()
            if metadata["pass"] != self._described():
                limit = f"it was begun with other settings; remove {self._checkpoint.parent} to begin anew"
                raise InvalidRequest("work", self._checkpoint.name, limit)
            self.sums.load({name: file.get_tensor(name) for name in list(file.keys())})
        self.done, self.fingerprint = int(metadata["done"]), metadata["fingerprint"]
        if self.done > self._pass.sequences:
            had = self.done * self._pass.sequence_tokens
            raise InvalidRequest("tokens", self._pass.sequences * self._pass.sequence_tokens, f"work has {had} already")

    def _described(self) -> str:
        """All but its length: a pass may go on for more sequences."""
        fields = asdict(self._pass)
        del fields["sequences"]
        return json.dumps(fields)

    def add(self, batch: list[PackedSequence]) -> None:
        """Runs a batch through both models and counts it in."""
        tokens = torch.tensor([sequence.token_ids for sequence in batch])
        with torch.no_grad():
            bottom, teacher = self._bottom_states(tokens)
            same = self._pair.top is self._pair.bottom
            top = bottom if same else states_at(self._pair.top, tokens, self.sums.top_depths)
            self.sums.add(bottom, top)
        hidden = {k: bottom[k] for k in self.sums.bottom_depths}
        self.trace.write(self.done, tokens, [sequence.file for sequence in batch], hidden, teacher)
        self.done += len(batch)
        for sequence in batch:
            self.fingerprint = chained(self.fingerprint, sequence.token_ids)

    def _bottom_states(self, tokens: Tensor) -> tuple[dict[int, Tensor], Teacher]:
        depths = {*self.sums.bottom_depths}
        if self._pair.top is self._pair.bottom:
            depths |= {*self.sums.top_depths}
        parts = [
            self._computed(tokens[some], depths) if place is None else self._recalled(tokens[some], depths, *place)
            for some, place in self._known.runs(tokens)
        ]
        states = {depth: torch.cat([found[depth] for found, _ in parts]) for depth in depths}
        ids, logprobs = (torch.cat([getattr(teacher, name) for _, teacher in parts]) for name in ("ids", "logprobs"))
        return states, Teacher(ids, logprobs)

    def _computed(self, tokens: Tensor, depths: set[int]) -> tuple[dict[int, Tensor], Teacher]:
        model = self._pair.bottom
        states = states_at(model, tokens, [*depths, model.depth])
        return states, teacher_of(model, states[model.depth], self._pair.vocabulary)

    def _recalled(
        self, tokens: Tensor, depths: set[int], trace: Trace, rows: Tensor
    ) -> tuple[dict[int, Tensor], Teacher]:
        kept = {depth: trace.hidden(depth, rows) for depth in depths & {*trace.shape.depths}}
        return kept | states_at(self._pair.bottom, tokens, depths - {*kept}), trace.teacher(rows)

    def checkpoint(self) -> None:
        """Leaves everything so far on disk, whole or not at all."""
        self.trace.flush()
        metadata = {"pass": self._described(), "done": str(self.done), "fingerprint": self.fingerprint}
        partial = self._checkpoint.with_suffix(".partial")
        save_file(self.sums.state(), partial, metadata)
        partial.replace(self._checkpoint)


def collect(
    pair: Pair,
    whole: Pass,
    folder: Path,
    sequences: Iterable[PackedSequence],
    progress: Callable[[int, int], None],
    known: Known | None = None,
) -> Collected:
    """Goes on with the pass in `folder` until `whole.sequences` sequences, or all that there are, are counted.

    `progress(done, of)` is called after every batch. What is `known` does not pass the bottom model again. Raises
    InvalidRequest where the folder holds another pass.
    """
    collector = Collector(pair, whole, folder, known or Known())
    rest = islice(sequences, collector.done, whole.sequences)
    for number, batch in enumerate(_batches(rest), 1):
        collector.add(batch)
        progress(collector.done, whole.sequences)
        if number % CHECKPOINT_BATCHES == 0:
            collector.checkpoint()
    collector.checkpoint()
    return Collected(collector.sums, collector.trace, collector.done, collector.fingerprint)


@dataclass(frozen=True)
class Begun:
    """What a folder's last checkpoint says of its pass."""

    cuts: tuple[Cut, ...]
    sequence_tokens: int
    settings: str
    # Sequences that count.
    done: int

    def trace(self, folder: Path, hidden_size: int) -> Trace:
        """What the pass has left in `folder`, of a bottom model of that width; as `Trace` raises."""
        depths = tuple(sorted({k for k, _ in self.cuts}))
        return Trace(folder, TraceShape(self.done, self.sequence_tokens, hidden_size, depths), changes=False)


def begun_in(folder: Path) -> Begun | None:
    """The pass that was begun in `folder`; None where there is none."""
    if not (folder / CHECKPOINT).exists():
        return None
    with safe_open(folder / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["pass"])
    cuts = tuple((k, j) for k, j in fields["cuts"])
    return Begun(cuts, fields["sequence_tokens"], fields["settings"], int(metadata["done"]))


def _batches(sequences: Iterator[PackedSequence]) -> Iterator[list[PackedSequence]]:
    while batch := list(islice(sequences, BATCH_SEQUENCES)):
        yield batch


def chained(fingerprint: str, token_ids: tuple[int, ...]) -> str:
    """The fingerprint of all sequences so far and one more; resumable, unlike a running hash."""
    return hashlib.sha256(fingerprint.encode() + json.dumps(token_ids).encode()).hexdigest()
