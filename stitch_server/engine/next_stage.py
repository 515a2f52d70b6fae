"""Every shard of a chain but the first: computes the steps of its upstream shards and gathers the replies.

In: steps from any number of links, and the replies of the next shards. Out: batches for the engine, steps for the next
shards, and one `StepReply` for each received step; some routes may end here while others go on. Steps are computed
whole, several in one pass: those of one link in order of arrival, and the links in turns, so that no link waits for
more than one step of each other link. Only where a next shard has no room for its part, a step and all later steps of
its sessions wait, and others pass.

Invariants: a step is answered once, when each of its segments is sampled, answered downstream or refused; and a
session's KV is freed downstream whenever it is freed here, since nobody else closes it there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from stitch.errors import Incompatible, OutOfStep, StitchError, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.session_table import CheckChain, Constrain, OpeningLimits, SessionTable, contradiction
from stitch_server.engine.types import (
    Batch,
    IncomingStep,
    LayerRange,
    PendingReply,
    ReplySlot,
    Segment,
    Session,
    SessionFailure,
    SessionRefused,
    StepOutput,
    StepReply,
    Upstream,
    in_layer_order,
)

if TYPE_CHECKING:
    from torch import Tensor


class StepQueue:
    """The steps that are not computed yet: those of one link in order of arrival, the links in turns."""

    def __init__(self) -> None:
        # By link, the link whose turn is next first.
        self._steps: dict[Upstream, deque[PendingReply]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._steps.values()))

    def add(self, pending: PendingReply) -> None:
        self._steps.setdefault(pending.upstream, deque()).append(pending)

    def of(self, upstream: Upstream) -> Iterable[PendingReply]:
        """The steps of a link, in order."""
        return self._steps.get(upstream, ())

    def in_turns(self) -> list[PendingReply]:
        """All steps: the first one of every link, then the second one of every link, and so on."""
        return [one for turn in zip_longest(*self._steps.values()) for one in turn if one is not None]

    def take(self, pending: PendingReply) -> None:
        """Removes a step; the next turn of its link comes after those of all other links."""
        steps = self._steps.pop(pending.upstream)
        steps.remove(pending)
        if steps:
            self._steps[pending.upstream] = steps

    def drop(self, upstream: Upstream) -> None:
        """Removes the steps of a link that ended."""
        self._steps.pop(upstream, None)


class NextStage:
    """The batch source of a shard without the embedding; every method runs in the engine's thread."""

    def __init__(
        self,
        kept: KeptPrefixes,
        layer_ranges: Mapping[str, LayerRange],
        in_flight: StepsInFlight | None,
        check_chain: CheckChain,
        max_merged_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        limits: OpeningLimits = OpeningLimits(),  # noqa: B008  # frozen
        shard: str = "",
        constrain: Constrain | None = None,
    ) -> None:
        """`kept` has the KV blocks of the shard's sessions, and the hidden states of their prefixes.

        `in_flight` is None where every route ends on this shard; `constrain` is for those that do.
        `max_merged_tokens`: of several steps in one pass. `shard` is the name of this one.
        """
        self._shard = shard
        self._pool = kept.pool
        self._kept = kept
        self._sessions = SessionTable(kept, layer_ranges, in_flight, check_chain, limits, clock, constrain)
        self._in_flight = in_flight
        self._max_merged_tokens = max_merged_tokens
        self._clock = clock
        self._queue = StepQueue()
        self._sent_at: dict[int, float] = {}

    @property
    def running_sessions(self) -> int:
        """The number of sessions with KV blocks."""
        return len(self._sessions)

    @property
    def waiting_sessions(self) -> int:
        """None: a session without a free block is refused, and waits on its first shard."""
        return 0

    def receive(self, upstream: Upstream, step: IncomingStep) -> None:
        """Queues a step."""
        self._queue.add(PendingReply(upstream, step, self._clock(), unresolved=len(step.segments)))

    def close(self, upstream: Upstream, session_ids: Sequence[int]) -> None:
        """Frees sessions that the upstream shard closes; queued steps of theirs do not open them again."""
        for session_id in session_ids:
            self._sessions.close(upstream, session_id)
        closed = set(session_ids)
        for pending in self._queue.of(upstream):
            pending.closed.update(one.session_id for one in pending.step.segments if one.session_id in closed)

    def want(self, upstream: Upstream, tokens: int, chain: tuple[str, ...]) -> None:
        """A link wishes for KV room for a session that goes on to `chain`; 0 tokens: no longer."""
        self._sessions.want(upstream, tokens, chain)

    def on_kv_room(self, neighbour: str, tokens: int) -> None:
        """Takes note of KV room that a next shard keeps for a session of this one."""
        if self._in_flight is not None:
            self._in_flight.credit.grant(neighbour, tokens)

    def drain(self) -> None:
        """Refuses new sessions from now on, with a cause that makes the gateway try another chain."""
        self._sessions.is_draining = True

    def on_upstream_lost(self, upstream: Upstream) -> None:
        """Frees all sessions of a link that ended, and drops its queued steps."""
        self._queue.drop(upstream)
        self._sessions.close_all(upstream)

    def next_batch(self) -> Batch | None:
        """Queued steps up to `max_merged_tokens`, at least one; None where there is none that next shards take."""
        # A draining shard refuses the sessions at once, instead of when it would have room.
        self._sessions.grants.give(to_all=self._sessions.is_draining)
        segments: list[Segment] = []
        num_tokens, pipelined = 0, False
        held_sessions: set[tuple[Upstream, int]] = set()
        for pending in self._queue.in_turns():
            if self._is_held(pending, held_sessions):
                continue
            num_tokens += sum(segment.length for segment in pending.step.segments)
            if segments and num_tokens > self._max_merged_tokens:
                break
            self._queue.take(pending)
            self._accept(pending, segments)
            pipelined = pipelined or pending.step.pipelined
        return Batch(in_layer_order(segments), pipelined) if segments else None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        """Sends hidden states to the next shards, or sampled tokens upstream; fails the sessions that have neither."""
        slots = [_slot_of(segment) for segment in batch.segments]
        for pending in _pending_of(slots):
            pending.add_seconds(output.stages)
        self._add_sampled(batch, output)
        if self._in_flight is not None:
            now = self._clock()
            for step in self._in_flight.send(batch, output, pipelined=len(self._queue) > 0):
                self._sent_at[step] = now
            self._kept.keep(batch, output)
        # After the send: a session that this batch opened downstream and that fails here must be closed there.
        for index, (segment, slot) in enumerate(zip(batch.segments, slots, strict=True)):
            if (values := output.non_finite.get(index)) is not None:
                self._fail_non_finite(segment, slot, values)
                continue
            # Also of a session that is refused: it is recomputed from its prefix.
            self._pool.publish(segment.session.id, segment.position + segment.length)
            if (reason := output.refused.get(index)) is not None:
                self._fail(slot, reason)
                slot.resolve()
        self._send_complete(_pending_of(slots))

    def fail(self, batch: Batch, error: Exception) -> None:
        """Fails the sessions of a batch that could not be computed."""
        slots = [_slot_of(segment) for segment in batch.segments]
        for slot in slots:
            failure = f"a shard failed to compute a step: {error}"
            self._fail(slot, SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, failure, self._shard))
            slot.resolve()
        self._send_complete(_pending_of(slots))

    def on_reply(self, neighbour: str, reply: StepReply) -> None:
        """Passes the tokens and failures of a step on to the steps that its segments came from."""
        answers = [] if self._in_flight is None else self._in_flight.settle(neighbour, reply)
        if not answers:
            return
        slots = [_slot_of(answer.segment) for answer in answers]
        for slot, answer in zip(slots, answers, strict=True):
            if (failure := answer.failure) is not None:
                self._fail(slot, SessionRefused(failure.cause, failure.message, failure.shard))
            elif answer.token is not None:
                slot.add_token(answer.epoch, answer.token)
        away = self._clock() - self._sent_at.pop(reply.step, self._clock())
        wire = max(0.0, away - sum(reply.stages.values()))
        for pending in _pending_of(slots):
            pending.add_seconds(reply.stages)
            pending.add_seconds({"wire": wire})
            pending.add_kv_free(reply.kv_free_tokens)
        for slot in slots:
            slot.resolve()
        self._send_complete(_pending_of(slots))

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        """Fails the sessions with KV on a next shard that is lost; those of other links continue."""
        is_refusal = isinstance(error, Incompatible | OutOfStep)
        cause = shard_pb2.FAILURE_CAUSE_PRECONDITION if is_refusal else shard_pb2.FAILURE_CAUSE_UNAVAILABLE
        shard = error.shard if isinstance(error, Unavailable) else ""
        if self._in_flight is None:
            return
        for step, segments in self._in_flight.sent_to(neighbour):
            failures = (SessionFailure(one.session.id, one.session.epoch, cause, str(error), shard) for one in segments)
            self.on_reply(neighbour, StepReply(step, failures=tuple(failures)))
        self._in_flight.credit.forget(neighbour)
        # Sessions without a step in flight: their next segments are refused.
        self._sessions.fail_downstream_of(neighbour, str(error), shard)

    def _is_held(self, pending: PendingReply, held_sessions: set[tuple[Upstream, int]]) -> bool:
        """Whether the step waits for room on a next shard, or for a step that does; adds its sessions then."""
        if self._in_flight is None:
            return False
        upstream, segments = pending.upstream, pending.step.segments
        sessions = {(upstream, segment.session_id) for segment in segments}
        has_room = all(self._in_flight.has_room(self._sessions.next_shards(upstream, one)) for one in segments)
        if has_room and sessions.isdisjoint(held_sessions):
            return False
        held_sessions |= sessions
        return True

    def _accept(self, pending: PendingReply, segments: list[Segment]) -> None:
        """Appends the segments of a step that can be computed; refuses the others in the step's reply."""
        pending.add_seconds({"queue": self._clock() - pending.received_at})
        hidden, row, touched = pending.step.hidden(), 0, [pending]
        for received in pending.step.segments:
            slot = ReplySlot(pending, received)
            rows = hidden[row : row + received.length]
            row += received.length
            try:
                session = self._sessions.accept(pending.upstream, received, received.session_id in pending.closed)
            except SessionRefused as reason:
                slot.add_failure(reason)
                slot.resolve()
                touched += self._withdraw(pending.upstream, received.session_id, reason, segments)
            else:
                if received.new_session is not None:
                    again = contradiction(f"session {received.session_id} was opened again")
                    touched += self._withdraw(pending.upstream, received.session_id, again, segments)
                segments.append(self._segment(session, rows, slot))
            for preempted in self._sessions.take_preempted():
                touched += self._withdraw(*preempted, segments)
        self._send_complete(touched)

    def _segment(self, session: Session, rows: Tensor, slot: ReplySlot) -> Segment:
        segment = Segment(
            session=session,
            layers=self._sessions.layers_of(session),
            position=slot.segment.position,
            length=slot.segment.length,
            wants_token=slot.segment.wants_token,
            blocks=self._pool.blocks_of(session.id),
            hidden=rows,
            reply_slot=slot,
        )
        return self._kept.attach(segment)

    def _withdraw(
        self, upstream: Upstream, session_id: int, reason: SessionRefused, segments: list[Segment]
    ) -> list[PendingReply]:
        """Removes the segments of a session that just failed from this batch, since its blocks are free."""
        withdrawn = [
            slot
            for slot in map(_slot_of, segments)
            if (slot.pending.upstream, slot.segment.session_id) == (upstream, session_id)
        ]
        for slot in withdrawn:
            slot.add_failure(reason)
            slot.resolve()
        segments[:] = [segment for segment in segments if segment.reply_slot not in withdrawn]
        return [slot.pending for slot in withdrawn]

    def _add_sampled(self, batch: Batch, output: StepOutput) -> None:
        """Adds the tokens that this shard sampled to the replies and to the sessions' tokens."""
        for index, segment in enumerate(batch.segments):
            if segment.session.chain:
                continue
            slot = _slot_of(segment)
            if index not in output.non_finite and index not in output.refused:
                slot.resolve()
            if (token := output.tokens.get(index)) is not None:
                segment.session.token_ids.append(token.id)
                if segment.session.constraint is not None:
                    segment.session.constraint.accept(token.id)
                slot.add_token(slot.segment.epoch, token)

    def _fail_non_finite(self, segment: Segment, slot: ReplySlot, values: str) -> None:
        """Ends the session for good: a replica has the same weights, and would compute the same values."""
        session_id = slot.segment.session_id
        message = f"{values} of session {session_id} at position {segment.position} are not finite"
        self._fail(slot, SessionRefused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message))
        slot.resolve()

    def _send_complete(self, replies: Iterable[PendingReply]) -> None:
        """Sends the replies whose segments are all resolved."""
        for pending in dict.fromkeys(replies):
            if pending.unresolved == 0:
                pending.send(self._sessions.grants.room_for(pending.upstream))

    def _fail(self, slot: ReplySlot, reason: SessionRefused) -> None:
        """Ends the slot's session and adds the reason for which it first failed to the reply."""
        received = slot.segment
        slot.add_failure(self._sessions.fail(slot.pending.upstream, received.session_id, received.epoch, reason))


def _slot_of(segment: Segment) -> ReplySlot:
    if segment.reply_slot is None:
        raise ValueError("a segment without a reply slot reached a shard that is not the first of its chain")
    return segment.reply_slot


def _pending_of(slots: Iterable[ReplySlot]) -> list[PendingReply]:
    """The replies that these slots belong to, each once, in order."""
    return list(dict.fromkeys(slot.pending for slot in slots))
