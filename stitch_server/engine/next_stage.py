"""The front of every shard but the first: steps from the shards before it. Knows no frames and no tensor library.

A step is computed whole, in the order of its arrival, together with others that wait. Its answer goes back when each
of its segments was sampled here, or answered by the shards behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stitch.errors import Incompatible, OutOfStep, StitchError
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.session_table import ReceivedSegment, Refused, SessionTable, Upstream
from stitch_server.engine.types import (
    Batch,
    Segment,
    Session,
    SessionFailure,
    SessionToken,
    StepOutput,
    StepReply,
    in_layer_order,
)
from stitch_server.kv_cache.block_pool import BlockPool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedStep:
    """One step of a neighbour; `hidden` unpacks its rows, `[tokens, hidden]`, in the engine's thread."""

    upstream: Upstream
    number: int
    segments: tuple[ReceivedSegment, ...]
    hidden: Callable[[], Tensor]
    pipelined: bool


@dataclass(slots=True, eq=False)
class _Answer:
    """The answer to one step, while it is being gathered."""

    step: ReceivedStep
    arrived: float
    # Segments that are neither sampled nor answered nor refused yet.
    awaited: int
    tokens: list[SessionToken] = field(default_factory=list)
    failures: list[SessionFailure] = field(default_factory=list)
    # Seconds by stage.
    stages: dict[str, float] = field(default_factory=dict)
    # Sessions that were closed while the step waited.
    closed: set[int] = field(default_factory=set)

    def spend(self, stages: Mapping[str, float]) -> None:
        for stage, seconds in stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def refuse(self, segment: ReceivedSegment, cause: FailureCause, message: str) -> None:
        self.failures.append(SessionFailure(segment.session, segment.epoch, cause, message))


@dataclass(frozen=True, slots=True)
class ReplySlot:
    """Whose answer a segment of a batch belongs to."""

    answer: _Answer
    received: ReceivedSegment


class NextStage:
    """Takes steps from any number of links: one cache and one batch for all of them."""

    def __init__(
        self,
        pool: BlockPool,
        intake: SessionTable,
        forwarding: StepsInFlight | None,
        batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool = pool
        self._intake = intake
        # None on the last shard of the chain.
        self._forwarding = forwarding
        self._batch_tokens = batch_tokens
        self._clock = clock
        self._pending: deque[_Answer] = deque()
        self._sent_at: dict[int, float] = {}

    @property
    def running_sessions(self) -> int:
        return len(self._intake)

    @property
    def waiting_sessions(self) -> int:
        return 0

    def receive(self, step: ReceivedStep) -> None:
        self._pending.append(_Answer(step, self._clock(), awaited=len(step.segments)))

    def close(self, upstream: Upstream, sessions: Sequence[int]) -> None:
        """These sessions of a link are over, and the steps of theirs that still wait must not open them again."""
        for session in sessions:
            self._intake.remove(upstream, session)
        for answer in self._pending:
            if answer.step.upstream is upstream:
                answer.closed.update(sessions)

    def link_closed(self, upstream: Upstream) -> None:
        """A link ended: nobody will hear of its sessions any more."""
        self._pending = deque(one for one in self._pending if one.step.upstream is not upstream)
        self._intake.remove_all(upstream)

    def next_batch(self) -> Batch | None:
        if self._forwarding is not None and self._forwarding.is_full:
            return None
        segments: list[Segment] = []
        tokens, pipelined = 0, False
        while self._pending:
            step = self._pending[0].step
            tokens += sum(segment.length for segment in step.segments)
            if segments and tokens > self._batch_tokens:
                break
            self._accept(self._pending.popleft(), segments)
            pipelined = pipelined or step.pipelined
        return Batch(in_layer_order(segments), pipelined) if segments else None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        parts = [_slot_of(segment) for segment in batch.segments]
        for answer in _answers_of(parts):
            answer.spend(output.stages)
        if self._forwarding is None:
            self._sampled(batch, output)
        else:
            now = self._clock()
            for step in self._forwarding.send(batch, output, pipelined=bool(self._pending)):
                self._sent_at[step] = now
        # Only now, since what is refused here must be closed behind as well, if this very batch opened it there.
        for index, (segment, part) in enumerate(zip(batch.segments, parts, strict=True)):
            if index in output.non_finite:
                self._spoil(segment, part)
            else:
                self._pool.publish(segment.session.id, segment.position + segment.length)
        _reply_where_done(_answers_of(parts))

    def fail(self, batch: Batch, error: Exception) -> None:
        parts = [_slot_of(segment) for segment in batch.segments]
        for part in parts:
            message = f"a shard failed to compute a step: {error}"
            self._refuse(part, shard_pb2.FAILURE_CAUSE_UNAVAILABLE, message)
            part.answer.awaited -= 1
        _reply_where_done(_answers_of(parts))

    def replied(self, reply: StepReply) -> None:
        """A shard behind answered a step of this shard."""
        segments = () if self._forwarding is None else self._forwarding.settle(reply.step)
        parts = [_slot_of(segment) for segment in segments]
        # Of two chunks of one session the later one wants the token.
        by_id = {segment.session.id: part for segment, part in zip(segments, parts, strict=True)}
        for sampled in reply.tokens:
            if (part := by_id.get(sampled.session_id)) is not None:
                part.answer.tokens.append(SessionToken(part.received.session, sampled.epoch, sampled.token))
        for failure in reply.failures:
            if (part := by_id.get(failure.session_id)) is not None:
                self._refuse(part, failure.cause, failure.message)
        away = self._clock() - self._sent_at.pop(reply.step, self._clock())
        wire = max(0.0, away - sum(reply.stages.values()))
        for answer in _answers_of(parts):
            answer.spend(reply.stages)
            answer.spend({"wire": wire})
        for part in parts:
            part.answer.awaited -= 1
        _reply_where_done(_answers_of(parts))

    def lost(self, address: str, error: StitchError) -> None:
        refused = isinstance(error, Incompatible | OutOfStep)
        cause = shard_pb2.FAILURE_CAUSE_PRECONDITION if refused else shard_pb2.FAILURE_CAUSE_UNAVAILABLE
        for step, segments in [] if self._forwarding is None else self._forwarding.sent_to(address):
            failures = (SessionFailure(one.session.id, one.session.epoch, cause, str(error)) for one in segments)
            self.replied(StepReply(step, failures=tuple(failures)))
        # Those that have no step under way hear of it with their next one.
        self._intake.lose(address, str(error))

    def _accept(self, answer: _Answer, segments: list[Segment]) -> None:
        """Appends a step's segments that can be computed; the others are refused in its answer."""
        step = answer.step
        answer.spend({"queue": self._clock() - answer.arrived})
        hidden, row, touched = step.hidden(), 0, [answer]
        for received in step.segments:
            rows = hidden[row : row + received.length]
            row += received.length
            try:
                sequence = self._intake.accept(step.upstream, received, received.session in answer.closed)
            except Refused as refusal:
                answer.refuse(received, refusal.cause, str(refusal))
                answer.awaited -= 1
                touched += self._withdraw(step.upstream, received.session, refusal, segments)
            else:
                segments.append(self._segment(sequence, received, rows, answer))
        _reply_where_done(touched)

    def _withdraw(self, upstream: Upstream, session: int, reason: Refused, segments: list[Segment]) -> list[_Answer]:
        """Takes back what this batch holds of a session that just ended: its blocks are free for others already."""
        parts = [_slot_of(segment) for segment in segments]
        gone = [part for part in parts if (part.answer.step.upstream, part.received.session) == (upstream, session)]
        for part in gone:
            part.answer.refuse(part.received, reason.cause, str(reason))
            part.answer.awaited -= 1
        segments[:] = [segment for segment, part in zip(segments, parts, strict=True) if part not in gone]
        return [part.answer for part in gone]

    def _segment(self, sequence: Session, received: ReceivedSegment, rows: Tensor, answer: _Answer) -> Segment:
        return Segment(
            session=sequence,
            layers=self._intake.layers(sequence),
            position=received.position,
            length=received.length,
            wants_token=received.wants_token,
            blocks=self._pool.blocks_of(sequence.id),
            hidden=rows,
            reply_slot=ReplySlot(answer, received),
        )

    def _sampled(self, batch: Batch, output: StepOutput) -> None:
        for index, segment in enumerate(batch.segments):
            part = _slot_of(segment)
            if index not in output.non_finite:
                part.answer.awaited -= 1
            if (token := output.tokens.get(index)) is not None:
                segment.session.token_ids.append(token.id)
                part.answer.tokens.append(SessionToken(part.received.session, part.received.epoch, token))

    def _spoil(self, segment: Segment, part: ReplySlot) -> None:
        message = f"hidden states of session {part.received.session} at position {segment.position} are not finite"
        self._refuse(part, shard_pb2.FAILURE_CAUSE_PRECONDITION, message)

        part.answer.awaited -= 1

    def _refuse(self, part: ReplySlot, cause: FailureCause, message: str) -> None:
        answer, received = part.answer, part.received
        reason = Refused(cause, message)
        first = self._intake.end(answer.step.upstream, received.session, received.epoch, reason)
        answer.refuse(received, first.cause, str(first))


def _reply_where_done(answers: Iterable[_Answer]) -> None:
    for answer in _once(answers):
        if answer.awaited == 0:
            reply = StepReply(answer.step.number, tuple(answer.tokens), tuple(answer.failures), dict(answer.stages))
            answer.step.upstream.reply(reply)


def _slot_of(segment: Segment) -> ReplySlot:
    if segment.reply_slot is None:
        raise ValueError("a segment without a reply slot reached a next stage")
    return segment.reply_slot


def _answers_of(parts: Iterable[ReplySlot]) -> list[_Answer]:
    return _once(part.answer for part in parts)


def _once(answers: Iterable[_Answer]) -> list[_Answer]:
    return list({id(answer): answer for answer in answers}.values())
