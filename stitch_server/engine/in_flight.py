"""Splits a pass's output into steps for the next shards, and tracks the steps that are not yet answered.

In: a computed batch. Out: one `OutgoingStep` for each next shard. Invariant: a step is in flight from `send` until
`settle`, which happens exactly once: when its reply arrives, or when its link is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stitch.errors import StitchError
from stitch_server.engine.types import Batch, OutgoingStep, Segment, Session, StepOutput, StepReply

# Steps in flight at most: two micro-batches being computed, and as many travelling over a slow link.
WINDOW_STEPS = 4


class Downstream(Protocol):
    """The links to the next shards, as the engine's thread calls them; no call blocks."""

    def send(self, address: str, step: OutgoingStep) -> None: ...

    def close(self, address: str, session_ids: Sequence[int]) -> None: ...


class BatchSource(Protocol):
    """Where the engine's batches come from and their results go: `FirstStage` or `NextStage`.

    Every method is called in the engine's thread.
    """

    def next_batch(self) -> Batch | None: ...

    def deliver(self, batch: Batch, output: StepOutput) -> None: ...

    def fail(self, batch: Batch, error: Exception) -> None: ...

    def on_reply(self, reply: StepReply) -> None: ...

    def on_link_lost(self, address: str, error: StitchError) -> None: ...


class StepsInFlight:
    """The steps that this shard has sent and whose replies have not arrived."""

    def __init__(self, downstream: Downstream, window_steps: int = WINDOW_STEPS) -> None:
        self._downstream = downstream
        self._window_steps = window_steps
        self._step_numbers = itertools.count(1)
        self._unanswered: dict[int, tuple[str, tuple[Segment, ...]]] = {}

    @property
    def count(self) -> int:
        """The number of steps in flight."""
        return len(self._unanswered)

    @property
    def is_full(self) -> bool:
        """Whether the next pass must wait for a reply, which bounds the memory of queued steps along the chain."""
        return len(self._unanswered) >= self._window_steps

    def send(self, batch: Batch, output: StepOutput, pipelined: bool) -> list[int]:
        """Sends the hidden states of each finite segment to its next shard; returns the numbers of the steps sent."""
        by_address: dict[str, list[int]] = {}
        for index, segment in enumerate(batch.segments):
            if index not in output.non_finite:
                by_address.setdefault(segment.session.chain[0], []).append(index)
        numbers = []
        for address, indices in by_address.items():
            number = next(self._step_numbers)
            segments = tuple(batch.segments[index] for index in indices)
            hidden = _rows_of(indices, batch.segments, output)
            urgent = self._may_overtake(segments)
            step = OutgoingStep(number, segments, _open_sessions(segments), hidden, pipelined, urgent)
            self._downstream.send(address, step)
            self._unanswered[number] = (address, segments)
            numbers.append(number)
        return numbers

    def settle(self, step: int) -> tuple[Segment, ...]:
        """Removes a step and returns its segments; empty where it is settled already."""
        return self._unanswered.pop(step, ("", ()))[1]

    def close_session(self, session: Session) -> None:
        """Frees the session's KV on the next shards; no effect where none of them knows its current epoch."""
        if session.open_downstream:
            self._downstream.close(session.chain[0], [session.id])

    def sent_to(self, address: str) -> list[tuple[int, tuple[Segment, ...]]]:
        """The unanswered steps of one link; settles none of them."""
        return [(step, segments) for step, (to, segments) in self._unanswered.items() if to == address]

    def _may_overtake(self, segments: tuple[Segment, ...]) -> bool:
        """Whether this is a decode step of sessions with nothing in flight, which need not wait for prefill."""
        in_flight = {segment.session.id for _, sent in self._unanswered.values() for segment in sent}
        return all(
            segment.length == 1 and segment.session.open_downstream and segment.session.id not in in_flight
            for segment in segments
        )


def _rows_of(indices: Sequence[int], segments: Sequence[Segment], output: StepOutput) -> Tensor:
    """The hidden states of some of the segments, concatenated. Raises ValueError where the output has none."""
    if output.hidden is None:
        raise ValueError("a step without hidden states cannot be sent downstream")
    if len(indices) == len(segments):
        return output.hidden
    rows = torch.split(output.hidden, [segment.length for segment in segments])
    return torch.cat([rows[index] for index in indices])


def _open_sessions(segments: tuple[Segment, ...]) -> tuple[bool, ...]:
    """Marks the sessions as open downstream; returns for each segment whether it is the one that opens its session."""
    opens = []
    for segment in segments:
        opens.append(not segment.session.open_downstream)
        segment.session.open_downstream = True
    return tuple(opens)
