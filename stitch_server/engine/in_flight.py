"""Sends a shard's results to the shards behind it and remembers what is still to be answered. Knows no frames."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stitch.errors import StitchError
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.types import Batch, Segment, StepOutput, Token
from stitch_server.rpc.tensors import Packed, pack

# Steps that may be unanswered at once: two groups computing, and as many on their way over a slow link.
WINDOW_STEPS = 4


@dataclass(frozen=True, slots=True)
class Failure:
    """A session that a shard behind this one can't go on with."""

    number: int
    epoch: int
    cause: FailureCause
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one step: by session number and epoch, as the sender of the step counts them."""

    step: int
    tokens: tuple[tuple[int, int, Token], ...] = ()
    failures: tuple[Failure, ...] = ()
    # Seconds that the step spent behind the link, by stage.
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutgoingStep:
    """One step as it leaves: the rows of all segments, one behind the other."""

    number: int
    segments: tuple[Segment, ...]
    # For each segment whether it is its session's first on this link.
    opens: tuple[bool, ...]
    rows: Packed
    # Whether this shard goes on computing while the next one does.
    pipelined: bool
    # Whether it may overtake what still waits to be sent: no session in it has an earlier step on its way.
    urgent: bool


class Downstream(Protocol):
    """The links to the next shards; callable from the engine's thread."""

    def send(self, address: str, step: OutgoingStep) -> None: ...

    def close(self, address: str, numbers: Sequenced[int]) -> None: ...


class BatchSource(Protocol):
    """Where a shard's work comes from and its results go: clients on the first shard, a link on every other.

    Everything happens in the engine's thread.
    """

    def next_batch(self) -> Batch | None: ...

    def deliver(self, batch: Batch, output: StepOutput) -> None: ...

    def fail(self, batch: Batch, error: Exception) -> None: ...

    def replied(self, reply: Reply) -> None: ...

    def lost(self, address: str, error: StitchError) -> None: ...


class StepsInFlight:
    """What this shard has sent and not yet heard of."""

    def __init__(self, downstream: Downstream, wire_dtype: str, window_steps: int = WINDOW_STEPS) -> None:
        self._downstream = downstream
        self._wire_dtype = wire_dtype
        self._window_steps = window_steps
        self._numbers = itertools.count(1)
        self._unanswered: dict[int, tuple[str, tuple[Segment, ...]]] = {}

    @property
    def steps_in_flight(self) -> int:
        return len(self._unanswered)

    @property
    def full(self) -> bool:
        """Whether the next step must wait for an answer: what bounds memory along the chain."""
        return len(self._unanswered) >= self._window_steps

    def send(self, batch: Batch, output: StepOutput, pipelined: bool) -> list[int]:
        """Sends each segment's hidden states to its next shard; returns the numbers of the steps this made."""
        by_address: dict[str, list[int]] = {}
        for index, segment in enumerate(batch.segments):
            if index not in output.non_finite:
                by_address.setdefault(segment.sequence.chain[0], []).append(index)
        numbers = []
        for address, indices in by_address.items():
            number = next(self._numbers)
            segments = tuple(batch.segments[index] for index in indices)
            rows = pack(_rows_of(indices, batch.segments, output), self._wire_dtype)
            urgent = self._may_overtake(segments)
            self._unanswered[number] = (address, segments)
            self._downstream.send(address, OutgoingStep(number, segments, _opens(segments), rows, pipelined, urgent))
            numbers.append(number)
        return numbers

    def settle(self, step: int) -> tuple[Segment, ...]:
        """A step was answered; its segments, or none where nobody waits for it any more."""
        return self._unanswered.pop(step, ("", ()))[1]

    def close(self, chain: tuple[str, ...], number: int) -> None:
        """Tells the next shard that a session is over."""
        self._downstream.close(chain[0], [number])

    def _may_overtake(self, segments: tuple[Segment, ...]) -> bool:
        """Whether this is a decode step, which should not wait for the frames of others' prompts."""
        under_way = {segment.sequence.number for _, sent in self._unanswered.values() for segment in sent}
        return all(
            segment.length == 1 and segment.sequence.opened and segment.sequence.number not in under_way
            for segment in segments
        )

    def lost(self, address: str) -> list[tuple[int, tuple[Segment, ...]]]:
        """The steps that `address` will never answer; each is still to be settled."""
        return [(step, segments) for step, (to, segments) in self._unanswered.items() if to == address]


def _rows_of(indices: Sequenced[int], segments: Sequenced[Segment], output: StepOutput) -> Tensor:
    """The hidden states of some of the segments, one behind the other. Raises ValueError where there are none."""
    if output.hidden is None:
        raise ValueError("a step without hidden states has nothing to send on")
    if len(indices) == len(segments):
        return output.hidden
    parts = torch.split(output.hidden, [segment.length for segment in segments])
    return torch.cat([parts[index] for index in indices])


def _opens(segments: tuple[Segment, ...]) -> tuple[bool, ...]:
    """Which segments are the first of their session on a link; afterwards the sessions count as opened."""
    opens = []
    for segment in segments:
        opens.append(not segment.sequence.opened)
        segment.sequence.opened = True
    return tuple(opens)
