"""Passes over the data through both models: sums for least squares, and a trace for distillation.

A run directory holds the two passes that a fit or a sweep needs:

    RUN/held-out/   trace and sums of the held-out sequences
    RUN/training/   trace and sums of the training sequences

A pass can be interrupted at any point. It resumes from its last checkpoint and adds the same numbers in the same order
as an uninterrupted one, and a finished pass can be extended by more sequences. An activation cache gives it the bottom
model's states and teacher of sequences that earlier passes recorded. Those states are rounded to bfloat16, so in
float32 the sums of a pass that uses a cache differ by that rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_training.data import Corpus, DataSettings, PackedSequence, Role, recallable
from stitch_training.device import batch_sequences
from stitch_training.least_squares import CutPoint, Sums
from stitch_training.models import Pair, states_at, teacher_of
from stitch_training.trace import Teacher, Trace, TraceShape

CHECKPOINT_BATCHES = 8
CHECKPOINT = "checkpoint.safetensors"
HELD_OUT, TRAINING = "held-out", "training"

# (task, units done, units in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PassResult:
    """A finished pass: its sums, the trace of its `sequences`, and the fingerprint of their tokens."""

    sums: Sums
    trace: Trace
    sequences: int
    fingerprint: str


@dataclass(frozen=True)
class PassSettings:
    """Everything that decides a pass; without a cache, two passes with equal settings give equal results."""

    name: str
    sequences: int
    sequence_tokens: int
    cuts: tuple[CutPoint, ...]
    # Everything else that decides the numbers: models, files, seed, dtype (`DataSettings.describe`).
    settings: str

    def describe(self) -> str:
        """Returns all but the number of sequences, which may grow, as JSON."""
        fields = asdict(self)
        del fields["sequences"]
        return json.dumps({**fields, "roles": [role.name for role in Role]})


class ActivationCache:
    """The sequences that earlier passes recorded, found by their tokens.

    A trace without depths serves for its teacher alone.
    """

    def __init__(self, traces: Iterable[Trace] = ()) -> None:
        self._rows: dict[bytes, tuple[Trace, int]] = {}
        for trace in traces:
            for row in range(trace.shape.sequences):
                self._rows.setdefault(_key(trace.tokens(torch.tensor([row]))), (trace, row))

    def lookup(self, tokens: Tensor) -> Iterator[tuple[slice, tuple[Trace, Tensor] | None]]:
        """Splits `tokens` `[sequences, tokens]` into slices, each with its rows of one trace, or None on a miss."""
        found = [self._rows.get(_key(sequence)) for sequence in tokens]
        start = 0
        for trace, run in groupby(found, key=lambda hit: None if hit is None else hit[0]):
            hits = list(run)
            end = start + len(hits)
            rows = torch.tensor([hit[1] for hit in hits if hit is not None])
            yield slice(start, end), None if trace is None else (trace, rows)
            start = end


def _key(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.numpy().tobytes()).digest()


class PassRecorder:
    """Adds batches of sequences to the sums and the trace of one pass."""

    def __init__(self, pair: Pair, settings: PassSettings, folder: Path, cache: ActivationCache) -> None:
        """Resumes from the checkpoint in `folder`. Raises InvalidRequest where it is of another pass."""
        self._pair, self._settings, self._cache = pair, settings, cache
        self.sums = Sums(settings.cuts, pair.bottom.hidden_size, pair.top.hidden_size, pair.device)
        depths = self.sums.bottom_depths
        shape = TraceShape(settings.sequences, settings.sequence_tokens, pair.bottom.hidden_size, depths)
        self._checkpoint = folder / CHECKPOINT
        self.done, self.fingerprint = 0, hashlib.sha256(settings.settings.encode()).hexdigest()
        if self._checkpoint.exists():
            self._resume()
        self.trace = Trace(folder, shape)

    def _resume(self) -> None:
        with safe_open(self._checkpoint, "pt") as file:
            metadata = file.metadata()
            if metadata["pass"] != self._settings.describe():
                limit = f"it has other settings; remove {self._checkpoint.parent} to start over"
                raise InvalidRequest("run_dir", self._checkpoint.name, limit)
            self.sums.load({name: file.get_tensor(name) for name in list(file.keys())})
        self.done, self.fingerprint = int(metadata["done"]), metadata["fingerprint"]
        if self.done > self._settings.sequences:
            tokens, recorded = (n * self._settings.sequence_tokens for n in (self._settings.sequences, self.done))
            raise InvalidRequest("tokens", tokens, f"the run directory already has {recorded}")

    def add(self, batch: list[PackedSequence]) -> None:
        """Runs a batch through both models, and records its sums and its trace."""
        tokens = torch.tensor([sequence.token_ids for sequence in batch])
        with torch.no_grad():
            bottom, teacher = self._bottom_states(tokens)
            is_one_model = self._pair.top is self._pair.bottom
            top = bottom if is_one_model else states_at(self._pair.top, tokens, self.sums.top_depths)
            self.sums.add(bottom, top)
        hidden = {k: bottom[k] for k in self.sums.bottom_depths}
        self.trace.write(self.done, batch, hidden, teacher)
        self.done += len(batch)
        for sequence in batch:
            self.fingerprint = chain_fingerprint(self.fingerprint, sequence.token_ids)

    def _bottom_states(self, tokens: Tensor) -> tuple[dict[int, Tensor], Teacher]:
        depths = {*self.sums.bottom_depths}
        if self._pair.top is self._pair.bottom:
            depths |= {*self.sums.top_depths}
        parts = [
            self._compute(tokens[some], depths) if hit is None else self._recall(tokens[some], depths, *hit)
            for some, hit in self._cache.lookup(tokens)
        ]
        states = {depth: torch.cat([found[depth] for found, _ in parts]) for depth in depths}
        ids, logprobs = (torch.cat([getattr(teacher, name) for _, teacher in parts]) for name in ("ids", "logprobs"))
        return states, Teacher(ids, logprobs)

    def _compute(self, tokens: Tensor, depths: set[int]) -> tuple[dict[int, Tensor], Teacher]:
        model, teacher, vocabulary = self._pair.bottom, self._pair.teacher, self._pair.vocabulary
        if teacher is model:
            states = states_at(model, tokens, [*depths, model.depth])
            return states, teacher_of(model, states[model.depth], vocabulary)
        last = states_at(teacher, tokens, [teacher.depth])[teacher.depth]
        return states_at(model, tokens, depths), teacher_of(teacher, last, vocabulary)

    def _recall(
        self, tokens: Tensor, depths: set[int], trace: Trace, rows: Tensor
    ) -> tuple[dict[int, Tensor], Teacher]:
        """Reads what the trace has, and computes the states of depths that were not traced."""
        device = self._pair.device
        cached = {depth: trace.hidden(depth, rows).to(device) for depth in depths & {*trace.shape.depths}}
        return cached | states_at(self._pair.bottom, tokens, depths - {*cached}), trace.teacher(rows).to(device)

    def checkpoint(self) -> None:
        """Writes the state of the pass atomically."""
        self.trace.flush()
        metadata = {"pass": self._settings.describe(), "done": str(self.done), "fingerprint": self.fingerprint}
        partial = self._checkpoint.with_suffix(".partial")
        save_file(self.sums.state(), partial, metadata)
        partial.replace(self._checkpoint)


def chain_fingerprint(fingerprint: str, token_ids: tuple[int, ...]) -> str:
    """Returns the fingerprint of the sequences so far and one more; unlike a running hash, it can be resumed."""
    return hashlib.sha256(fingerprint.encode() + json.dumps(token_ids).encode()).hexdigest()


def record(
    pair: Pair,
    settings: PassSettings,
    folder: Path,
    sequences: Iterable[PackedSequence],
    progress: Callable[[int, int], None],
    cache: ActivationCache | None = None,
) -> PassResult:
    """Continues the pass in `folder` up to `settings.sequences` sequences, or to the end of the data.

    `progress(done, total)` is called after every batch. Cached sequences don't run through the bottom model again.
    Raises InvalidRequest where the folder holds another pass.
    """
    recorder = PassRecorder(pair, settings, folder, cache or ActivationCache())
    remaining = islice(sequences, recorder.done, settings.sequences)
    for number, batch in enumerate(_batches(remaining, batch_sequences(pair.device)), 1):
        recorder.add(batch)
        progress(recorder.done, settings.sequences)
        if number % CHECKPOINT_BATCHES == 0:
            recorder.checkpoint()
    recorder.checkpoint()
    return PassResult(recorder.sums, recorder.trace, recorder.done, recorder.fingerprint)


def _batches(sequences: Iterator[PackedSequence], size: int) -> Iterator[list[PackedSequence]]:
    while batch := list(islice(sequences, size)):
        yield batch


@dataclass(frozen=True)
class PassCheckpoint:
    """The settings and progress of a pass, finished or not, as its folder's last checkpoint gives them."""

    cuts: tuple[CutPoint, ...]
    sequence_tokens: int
    settings: str
    # Recorded sequences.
    done: int

    def open_trace(self, folder: Path, hidden_size: int, has_states: bool = True) -> Trace:
        """Opens the pass's trace, of a bottom model of that width, read-only. Raises what `Trace` raises.

        Without states it gives the teacher alone.
        """
        depths = tuple(sorted({k for k, _ in self.cuts})) if has_states else ()
        return Trace(folder, TraceShape(self.done, self.sequence_tokens, hidden_size, depths), writable=False)


def read_checkpoint(folder: Path) -> PassCheckpoint | None:
    """Reads the checkpoint in `folder`; None where there is none."""
    if not (folder / CHECKPOINT).exists():
        return None
    with safe_open(folder / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["pass"])
    cuts = tuple(CutPoint(k, j) for k, j in fields["cuts"])
    return PassCheckpoint(cuts, fields["sequence_tokens"], fields["settings"], int(metadata["done"]))


@dataclass(frozen=True)
class Passes:
    """The two finished passes of a run directory."""

    training: PassResult
    held_out: PassResult


def choose_cuts(
    cuts: tuple[CutPoint, ...], run_dir: Path, suffices: Callable[[tuple[CutPoint, ...]], bool]
) -> tuple[CutPoint, ...]:
    """Returns the cut points of the earlier pass in `run_dir` where that one `suffices`, else `cuts`."""
    earlier = read_checkpoint(run_dir / TRAINING)
    return earlier.cuts if earlier is not None and suffices(earlier.cuts) else cuts


def run_passes(
    pair: Pair,
    cuts: tuple[CutPoint, ...],
    corpus: Corpus,
    data: DataSettings,
    settings: str,
    run_dir: Path,
    progress: Progress,
    reuse: Sequence[Path] = (),
) -> Passes:
    """Runs the held-out and the training pass, or resumes those in `run_dir`.

    Sequences recorded in the run directories `reuse` don't run through the bottom model again, but for depths that were
    not traced; those of another bottom with the same teacher don't run through the teacher again. Raises InvalidRequest
    where the data are too few, or a folder holds another pass.
    """
    cache = ActivationCache(trace for folder in reuse for trace in _traces_in(folder, pair, data, settings))
    held_sequences = corpus.held_out(data.held_out_tokens)
    held = PassSettings(HELD_OUT, len(held_sequences), data.sequence_tokens, cuts, settings)
    training = PassSettings(TRAINING, -(-data.tokens // data.sequence_tokens), data.sequence_tokens, cuts, settings)
    return Passes(
        held_out=record(pair, held, run_dir / HELD_OUT, held_sequences, lambda *n: progress("held-out", *n), cache),
        training=record(pair, training, run_dir / TRAINING, corpus.training(), lambda *n: progress("data", *n), cache),
    )


def _traces_in(run_dir: Path, pair: Pair, data: DataSettings, settings: str) -> Iterator[Trace]:
    """Yields the traces of a run directory's passes, finished or not."""
    found = {name: one for name in (HELD_OUT, TRAINING) if (one := read_checkpoint(run_dir / name)) is not None}
    if not found:
        raise InvalidRequest("reuse", run_dir.name, "it holds no pass")
    for name, checkpoint in found.items():
        has_states, has_teacher = recallable(checkpoint.settings, settings)
        if not has_teacher:
            raise InvalidRequest("reuse", run_dir.name, "its pass is of other models, or of another dtype")
        if checkpoint.sequence_tokens != data.sequence_tokens:
            limit = f"its sequences have {checkpoint.sequence_tokens} tokens, not {data.sequence_tokens}"
            raise InvalidRequest("reuse", run_dir.name, limit)
        try:
            yield checkpoint.open_trace(run_dir / name, pair.bottom.hidden_size, has_states)
        except (OSError, ValueError) as error:
            raise InvalidRequest("reuse", run_dir.name, f"its {name} pass is incomplete: {error}") from error
