"""Splits a pass's output into steps for the next shards, and tracks the steps that are not yet answered.

In: a computed batch. Out: one `OutgoingStep` for each next shard. Invariants: a step is in flight from `send` until
`settle`, which happens exactly once: when its reply arrives, or when its link is lost; a reply counts for the sessions
of its step alone; and every next shard has a window of its own, so that one which does not answer holds back its own
sessions alone.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from stitch.errors import StitchError, Unavailable
from stitch.sampling import Token
from stitch.v1.shard_pb2 import FAILURE_CAUSE_UNAVAILABLE
from stitch_server.engine.kv_room import KvCredit
from stitch_server.engine.types import (
    Batch,
    OutgoingStep,
    Segment,
    Session,
    SessionFailure,
    StepOutput,
    StepReply,
)

# Steps in flight to one next shard at most: two micro-batches being computed, and as many travelling over a slow link.
WINDOW_STEPS = 4
# Steps whose sessions have all ended leave the window, but are kept by the next shard until it has answered them.
MAX_UNANSWERED_STEPS = 16
# A next shard is late when it has answered nothing for this long, and for this many times as long as any of the latest
# replies of all next shards took.
LATE_SECONDS = 0.25
LATE_FACTOR = 2.0
RECENT_REPLIES = 64


class Downstream(Protocol):
    """The links to the next shards, as the engine's thread calls them; no call blocks."""

    @property
    def suspects(self) -> AbstractSet[str]:
        """The next shards that have been silent for too long, and have lost their links; they get no sessions."""

    @property
    def doubted(self) -> AbstractSet[str]:
        """Other next shards that are silent for now; they get no new sessions."""

    def send(self, neighbour: str, step: OutgoingStep) -> None: ...

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None: ...

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        """Asks for KV room for a session, which goes on to `chain`; 0 tokens: no longer."""


class BatchSource(Protocol):
    """Where the engine's batches come from and their results go: `FirstStage` or `NextStage`.

    Every method is called in the engine's thread.
    """

    def next_batch(self) -> Batch | None: ...

    def deliver(self, batch: Batch, output: StepOutput) -> None: ...

    def fail(self, batch: Batch, error: Exception) -> None: ...

    def on_reply(self, neighbour: str, reply: StepReply) -> None: ...

    def on_kv_room(self, neighbour: str, tokens: int) -> None: ...

    def on_link_lost(self, neighbour: str, error: StitchError) -> None: ...


@dataclass(slots=True)
class _SentStep:
    """A step that is not answered yet."""

    neighbour: str
    segments: tuple[Segment, ...]
    # Those of the segments' sessions; a session that is preempted begins another one.
    epochs: tuple[int, ...]
    sent_at: float
    # Ids of the sessions that have not ended since.
    live: set[int]


@dataclass(frozen=True, slots=True)
class SegmentReply:
    """What a next shard replied to one segment: a token, a failure, or neither where none was wanted."""

    segment: Segment
    # That of the segment's session when it was sent.
    epoch: int
    token: Token | None
    failure: SessionFailure | None


@dataclass(slots=True)
class _Window:
    """The unanswered steps of one next shard, by number, in the order in which they were sent."""

    steps: dict[int, _SentStep] = field(default_factory=dict)
    # When the next shard last answered a step.
    answered_at: float = 0.0

    def age_at(self, now: float) -> float:
        """Seconds for which steps have been waiting without any answer; 0 where none waits."""
        # A copy, since metrics are read in another thread.
        steps = list(self.steps.values())
        return now - max(steps[0].sent_at, self.answered_at) if steps else 0.0


class StepsInFlight:
    """The steps that this shard has sent and whose replies have not arrived."""

    def __init__(
        self,
        downstream: Downstream,
        window_steps: int = WINDOW_STEPS,
        clock: Callable[[], float] = time.perf_counter,
        count_strays: Callable[[int], None] = lambda strays: None,
    ) -> None:
        """`count_strays` is called with the number of replies, tokens and failures that answer no step."""
        self._downstream = downstream
        self._count_strays = count_strays
        # The KV room of the next shards.
        self.credit = KvCredit(downstream)
        self._window_steps = window_steps
        self._clock = clock
        self._step_numbers = itertools.count(1)
        self._unanswered: dict[int, _SentStep] = {}
        self._windows: dict[str, _Window] = {}
        # How long the latest answered steps took, in seconds.
        self._reply_seconds: deque[float] = deque(maxlen=RECENT_REPLIES)

    @property
    def count(self) -> int:
        """The number of steps in flight."""
        return len(self._unanswered)

    @property
    def age_seconds(self) -> float:
        """The longest time for which a next shard has left its steps unanswered; 0 where nothing is in flight.

        Callable from any thread.
        """
        now = self._clock()
        return max((window.age_at(now) for window in list(self._windows.values())), default=0.0)

    def has_room(self, neighbours: Sequence[str]) -> bool:
        """Whether each of these next shards takes one more step, which bounds the memory of the steps queued there."""
        return all(self._takes_a_step(neighbour) for neighbour in neighbours)

    def is_late(self, neighbours: Sequence[str]) -> bool:
        """Whether one of these next shards takes so long for its steps that nobody else should wait for it."""
        return any(self._is_late(neighbour) for neighbour in neighbours)

    def refusal(self, neighbours: Sequence[str]) -> Unavailable | None:
        """Why no session may be opened on these next shards: one of them is silent; None where none is."""
        silent = self._downstream.suspects | self._downstream.doubted
        for neighbour in neighbours:
            if neighbour in silent:
                return Unavailable(f"{neighbour} does not answer in time", shard=neighbour)
        return None

    def send(self, batch: Batch, output: StepOutput, pipelined: bool) -> list[int]:
        """Sends the hidden states of each finite segment to its next shard; returns the numbers of the steps sent.

        A segment whose route ends here has none.
        """
        by_neighbour: dict[str, list[int]] = {}
        for index, segment in enumerate(batch.segments):
            if segment.session.chain and index not in output.non_finite:
                by_neighbour.setdefault(segment.session.chain[0], []).append(index)
        numbers = []
        for neighbour, indices in by_neighbour.items():
            number = next(self._step_numbers)
            segments = tuple(batch.segments[index] for index in indices)
            hidden = _rows_of(indices, batch.segments, output)
            urgent = self._may_overtake(segments)
            step = OutgoingStep(number, segments, _open_sessions(segments), hidden, pipelined, urgent)
            self._downstream.send(neighbour, step)
            self._record(number, neighbour, segments)
            numbers.append(number)
        return numbers

    def settle(self, neighbour: str, reply: StepReply) -> list[SegmentReply]:
        """Removes the step that `neighbour` answers, and returns the reply to each of its segments.

        Nothing of a reply counts but what answers a segment of the step: its session and epoch, and a token where one
        was wanted, at the next position. Empty where no such step of that shard is in flight.
        """
        sent = self._unanswered.get(reply.step)
        if sent is None or sent.neighbour != neighbour:
            self._count_strays(1)
            return []
        self._remove(reply.step, sent)
        self.credit.report(neighbour, reply.kv_free_tokens, sent.segments)
        replies, strays = _matched(sent, reply)
        if strays:
            self._count_strays(strays)
        return replies

    def _remove(self, step: int, sent: _SentStep) -> None:
        del self._unanswered[step]
        window, now = self._windows[sent.neighbour], self._clock()
        # A suspect's steps were not answered but lost.
        if sent.neighbour not in self._downstream.suspects:
            self._reply_seconds.append(now - max(sent.sent_at, window.answered_at))
        window.answered_at = now
        del window.steps[step]

    def close_session(self, session: Session) -> None:
        """Frees the session's KV on the next shards; no effect where none of them knows its current epoch."""
        self.credit.close(session)
        if session.open_downstream:
            self._downstream.close(session.chain[0], [session.id])
            for sent in self._window(session.chain[0]).steps.values():
                sent.live.discard(session.id)

    def sent_to(self, neighbour: str) -> list[tuple[int, tuple[Segment, ...]]]:
        """The unanswered steps sent to one next shard; settles none of them."""
        return [(step, sent.segments) for step, sent in self._window(neighbour).steps.items()]

    def _window(self, neighbour: str) -> _Window:
        window = self._windows.get(neighbour)
        if window is None:
            window = self._windows[neighbour] = _Window()
        return window

    def _record(self, number: int, neighbour: str, segments: tuple[Segment, ...]) -> None:
        epochs = tuple(segment.session.epoch for segment in segments)
        sent = _SentStep(neighbour, segments, epochs, self._clock(), {segment.session.id for segment in segments})
        self._unanswered[number] = self._window(neighbour).steps[number] = sent

    def _takes_a_step(self, neighbour: str) -> bool:
        steps = self._window(neighbour).steps
        if len(steps) < self._window_steps:
            return True
        return len(steps) < MAX_UNANSWERED_STEPS and sum(bool(one.live) for one in steps.values()) < self._window_steps

    def _is_late(self, neighbour: str) -> bool:
        age = self._window(neighbour).age_at(self._clock())
        if age and neighbour in self._downstream.doubted:
            return True
        return age > LATE_SECONDS and age > LATE_FACTOR * max(self._reply_seconds, default=0.0)

    def _may_overtake(self, segments: tuple[Segment, ...]) -> bool:
        """Whether this is a decode step of sessions with nothing in flight, which need not wait for prefill."""
        in_flight = {segment.session.id for sent in self._unanswered.values() for segment in sent.segments}
        return all(
            segment.length == 1 and segment.session.open_downstream and segment.session.id not in in_flight
            for segment in segments
        )


def _matched(sent: _SentStep, reply: StepReply) -> tuple[list[SegmentReply], int]:
    """The reply to each segment of a step, and how many tokens and failures answer none of them.

    A failure counts for the last segment of its session. A session whose token is missing fails: it could not go on.
    """
    last: dict[tuple[int, int], int] = {}
    wanted: dict[tuple[int, int, int], int] = {}
    for index, (segment, epoch) in enumerate(zip(sent.segments, sent.epochs, strict=True)):
        last[segment.session.id, epoch] = index
        if segment.wants_token:
            wanted[segment.session.id, epoch, segment.position + segment.length] = index
    tokens: dict[int, Token] = {}
    failures: dict[int, SessionFailure] = {}
    strays = 0
    for sampled in reply.tokens:
        if (index := wanted.pop((sampled.session_id, sampled.epoch, sampled.token.position), -1)) < 0:
            strays += 1
        else:
            tokens[index] = sampled.token
    for failure in reply.failures:
        if (index := last.get((failure.session_id, failure.epoch), -1)) < 0:
            strays += 1
        else:
            failures.setdefault(index, _of_chain(failure, sent.segments[index].session))
    for session_id, epoch, position in wanted:
        message = f"{sent.neighbour} answered a step without token {position} of its session"
        missing = SessionFailure(session_id, epoch, FAILURE_CAUSE_UNAVAILABLE, message, sent.neighbour)
        failures.setdefault(last[session_id, epoch], missing)
    return [
        SegmentReply(segment, epoch, None if index in failures else tokens.get(index), failures.get(index))
        for index, (segment, epoch) in enumerate(zip(sent.segments, sent.epochs, strict=True))
    ], strays


def _of_chain(failure: SessionFailure, session: Session) -> SessionFailure:
    """The failure, without the name of a lost shard that the session does not pass."""
    return failure if failure.shard in session.chain else replace(failure, shard="")


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
