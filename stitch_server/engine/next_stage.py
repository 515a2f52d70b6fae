"""Every shard of a chain but the first: computes the steps of its upstream shards and gathers the replies.

In: steps from any number of links, and the replies of the next shards. Out: batches for the engine, steps for the next
shards, and one `StepReply` for each received step. Steps are computed whole, several in one pass, in order of arrival;
only where a next shard has no room for its part, a step and all later steps of its sessions wait, and others pass.

Invariants: a step is answered once, when each of its segments is sampled, answered downstream or refused; and a
session's KV is freed downstream whenever it is freed here, since nobody else closes it there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stitch.errors import Incompatible, InvalidRequest, OutOfStep, StitchError, Unavailable
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.types import (
    Batch,
    IncomingSegment,
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
from stitch_server.kv_cache.block_pool import BlockPool

if TYPE_CHECKING:
    from torch import Tensor


# Token ids are 32 bits wide.
UNLIMITED = 1 << 32
# Takes a route, and the names of the shards that a session takes after this one; raises InvalidRequest where these are
# not those of the route.
CheckChain = Callable[[str, Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class _Tombstone:
    """Why an epoch of a session failed; later segments of that epoch are refused for the same reason."""

    epoch: int
    cause: FailureCause
    message: str
    shard: str

    @property
    def reason(self) -> SessionRefused:
        """A new one each time: an exception keeps the frames that it was raised through."""
        return SessionRefused(self.cause, self.message, self.shard)


class SessionTable:
    """The sessions that upstream shards have opened here, with their KV blocks, and tombstones of failed ones.

    A tombstone remains until the upstream shard closes the session.
    """

    def __init__(
        self,
        pool: BlockPool,
        layer_ranges: Mapping[str, LayerRange],
        in_flight: StepsInFlight | None,
        check_chain: CheckChain,
        vocabulary_size: int = UNLIMITED,
    ) -> None:
        """`in_flight` is None on the chain's last shard, whose head has `vocabulary_size` logits."""
        self._pool = pool
        self._layer_ranges = layer_ranges
        self._in_flight = in_flight
        self._check_chain = check_chain
        self._vocabulary_size = vocabulary_size
        self._sessions: dict[Upstream, dict[int, Session]] = {}
        self._tombstones: dict[Upstream, dict[int, _Tombstone]] = {}
        # Whether new sessions are refused, because the shard is shutting down.
        self.is_draining = False

    def __len__(self) -> int:
        # A copy, since metrics are read in another thread.
        return sum(len(sessions) for sessions in list(self._sessions.values()))

    def accept(self, upstream: Upstream, segment: IncomingSegment, closed: bool = False) -> Session:
        """Returns the segment's session, with KV blocks for the segment. Raises SessionRefused.

        `closed`: the upstream shard closed the session after it had sent the segment, which must not open it again.
        """
        known = segment.session_id in self._sessions.get(upstream, {})
        opened = None if closed else segment.new_session
        try:
            if opened is not None:
                self._open(upstream, segment.session_id, opened)
            return self._extend(upstream, segment)
        except SessionRefused as reason:
            if known or opened is not None:
                self._replace_by_tombstone(upstream, segment.session_id, segment.epoch, reason)
            raise

    def next_shards(self, upstream: Upstream, segment: IncomingSegment) -> tuple[str, ...]:
        """The shard to which the segment goes on; none from the chain's last shard, or for an unknown session."""
        session = segment.new_session or self._sessions.get(upstream, {}).get(segment.session_id)
        return () if session is None else session.next_shards

    def layers_of(self, session: Session) -> LayerRange:
        """The layers of this shard that the session's route passes."""
        return self._layer_ranges[session.route]

    def close(self, upstream: Upstream, session_id: int) -> None:
        """Frees a session that the upstream shard closes; no effect on an unknown one."""
        self._tombstones.get(upstream, {}).pop(session_id, None)
        session = self._sessions.get(upstream, {}).pop(session_id, None)
        if session is not None:
            self._free(session)

    def close_all(self, upstream: Upstream) -> None:
        """Frees all sessions of a link that ended."""
        self._tombstones.pop(upstream, None)
        for session in self._sessions.pop(upstream, {}).values():
            self._free(session)

    def fail(self, upstream: Upstream, session_id: int, epoch: int, reason: SessionRefused) -> SessionRefused:
        """Ends an epoch of a session, unless it is closed or preempted; returns why it first failed."""
        tombstone = self._tombstones.get(upstream, {}).get(session_id)
        if tombstone is not None and tombstone.epoch == epoch:
            return tombstone.reason
        session = self._sessions.get(upstream, {}).get(session_id)
        if session is not None and session.epoch == epoch:
            self._replace_by_tombstone(upstream, session_id, epoch, reason)
        return reason

    def fail_downstream_of(self, neighbour: str, message: str, shard: str = "") -> None:
        """Ends the sessions with KV on a next shard that is lost; their next segments are refused."""
        reason = SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, message, shard)
        for upstream, sessions in self._sessions.items():
            for session_id, session in list(sessions.items()):
                if session.open_downstream and session.chain[0] == neighbour:
                    self.fail(upstream, session_id, session.epoch, reason)

    def _open(self, upstream: Upstream, session_id: int, session: Session) -> None:
        """Adds a new session, in place of an earlier epoch; its first `reused` tokens must be cached."""
        if self.is_draining:
            message = "a shard of the chain is draining and takes no new sessions"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_DRAINING, message)
        if session.route not in self._layer_ranges:
            raise _contradiction(
                f"route {session.route} does not pass this shard, only {', '.join(self._layer_ranges)}"
            )
        if session.route not in upstream.routes:
            raise _contradiction(f"route {session.route} does not come over this link, only {sorted(upstream.routes)}")
        self._check_downstream(session)
        is_last = self._in_flight is None
        if is_last and (largest := max(session.sampling.forced_token_ids, default=0)) >= self._vocabulary_size:
            raise _contradiction(f"token {largest} is forced, but the head has {self._vocabulary_size} logits")
        if self._in_flight is not None and (suspect := self._in_flight.refusal(session.next_shards)) is not None:
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, str(suspect), suspect.shard)
        reused_blocks, rest = divmod(session.reused, self._pool.block_tokens)
        if rest:
            raise _contradiction(f"{session.reused} reused tokens are no whole blocks of {self._pool.block_tokens}")
        hashes = self._pool.hashes(session.tenant, session.route, session.token_ids[: session.prompt_tokens])
        if not self._pool.begin(session.id, hashes, reused_blocks):
            message = f"the first {session.reused} tokens of session {session_id} are not cached"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_PREFIX_MISSING, message)
        self.close(upstream, session_id)
        self._sessions.setdefault(upstream, {})[session_id] = session

    def _check_downstream(self, session: Session) -> None:
        """Refuses a session that continues on shards other than those of its route."""
        try:
            self._check_chain(session.route, session.chain)
        except InvalidRequest as error:
            raise _contradiction(str(error)) from error

    def _extend(self, upstream: Upstream, segment: IncomingSegment) -> Session:
        """Advances the segment's session by the segment, which must continue exactly where the session is."""
        session = self._sessions.get(upstream, {}).get(segment.session_id)
        if session is None:
            raise self._why_not_open(upstream, segment)
        if (segment.epoch, segment.position) != (session.epoch, session.cached):
            raise _contradiction(
                f"session {segment.session_id} sends epoch {segment.epoch}, position {segment.position}, "
                f"but epoch {session.epoch}, position {session.cached} comes next"
            )
        self._grow(session, session.cached + segment.length, segment.session_id)
        session.cached += segment.length
        return session

    def _grow(self, session: Session, tokens: int, session_id: int) -> None:
        if self._pool.grow(session.id, tokens):
            return
        if tokens > self._pool.tokens:
            message = f"session {session_id} has {tokens} tokens, but the KV cache holds {self._pool.tokens}"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_TOO_LONG, message)
        raise SessionRefused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, f"no KV block is free for session {session_id}")

    def _why_not_open(self, upstream: Upstream, segment: IncomingSegment) -> SessionRefused:
        tombstone = self._tombstones.get(upstream, {}).get(segment.session_id)
        if tombstone is None or tombstone.epoch != segment.epoch:
            return _contradiction(f"session {segment.session_id} is not open here")
        return tombstone.reason

    def _replace_by_tombstone(self, upstream: Upstream, session_id: int, epoch: int, reason: SessionRefused) -> None:
        self.close(upstream, session_id)
        self._tombstones.setdefault(upstream, {})[session_id] = _Tombstone(
            epoch, reason.cause, str(reason), reason.shard
        )

    def _free(self, session: Session) -> None:
        self._pool.release(session.id)
        if self._in_flight is not None:
            self._in_flight.close_session(session)


class NextStage:
    """The batch source of a shard without the embedding; every method runs in the engine's thread."""

    def __init__(
        self,
        pool: BlockPool,
        layer_ranges: Mapping[str, LayerRange],
        in_flight: StepsInFlight | None,
        check_chain: CheckChain,
        max_merged_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        vocabulary_size: int = UNLIMITED,
        shard: str = "",
    ) -> None:
        """`in_flight` is None on the chain's last shard, whose head has `vocabulary_size` logits.

        `max_merged_tokens`: of several steps in one pass. `shard` is the name of this one.
        """
        self._shard = shard
        self._pool = pool
        self._sessions = SessionTable(pool, layer_ranges, in_flight, check_chain, vocabulary_size)
        self._in_flight = in_flight
        self._max_merged_tokens = max_merged_tokens
        self._clock = clock
        # Steps in order of arrival, none of which is computed yet.
        self._queue: deque[PendingReply] = deque()
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
        self._queue.append(PendingReply(upstream, step, self._clock(), unresolved=len(step.segments)))

    def close(self, upstream: Upstream, session_ids: Sequence[int]) -> None:
        """Frees sessions that the upstream shard closes; queued steps of theirs do not open them again."""
        for session_id in session_ids:
            self._sessions.close(upstream, session_id)
        for pending in self._queue:
            if pending.upstream is upstream:
                pending.closed.update(session_ids)

    def drain(self) -> None:
        """Refuses new sessions from now on, with a cause that makes the gateway try another chain."""
        self._sessions.is_draining = True

    def on_upstream_lost(self, upstream: Upstream) -> None:
        """Frees all sessions of a link that ended, and drops its queued steps."""
        self._queue = deque(pending for pending in self._queue if pending.upstream is not upstream)
        self._sessions.close_all(upstream)

    def next_batch(self) -> Batch | None:
        """Queued steps up to `max_merged_tokens`, at least one; None where there is none that next shards take."""
        segments: list[Segment] = []
        num_tokens, pipelined = 0, False
        held: list[PendingReply] = []
        held_sessions: set[tuple[Upstream, int]] = set()
        while self._queue:
            pending, step = self._queue[0], self._queue[0].step
            if self._is_held(pending, held_sessions):
                held.append(self._queue.popleft())
                continue
            num_tokens += sum(segment.length for segment in step.segments)
            if segments and num_tokens > self._max_merged_tokens:
                break
            self._accept(self._queue.popleft(), segments)
            pipelined = pipelined or step.pipelined
        self._queue.extendleft(reversed(held))
        return Batch(in_layer_order(segments), pipelined) if segments else None

    def deliver(self, batch: Batch, output: StepOutput) -> None:
        """Sends hidden states to the next shards, or sampled tokens upstream; fails sessions with non-finite values."""
        slots = [_slot_of(segment) for segment in batch.segments]
        for pending in _pending_of(slots):
            pending.add_seconds(output.stages)
        if self._in_flight is None:
            self._add_sampled(batch, output)
        else:
            now = self._clock()
            for step in self._in_flight.send(batch, output, pipelined=bool(self._queue)):
                self._sent_at[step] = now
        # After the send: a session that this batch opened downstream and that fails here must be closed there.
        for index, (segment, slot) in enumerate(zip(batch.segments, slots, strict=True)):
            if (values := output.non_finite.get(index)) is not None:
                self._fail_non_finite(segment, slot, values)
            else:
                self._pool.publish(segment.session.id, segment.position + segment.length)
        _send_complete(_pending_of(slots))

    def fail(self, batch: Batch, error: Exception) -> None:
        """Fails the sessions of a batch that could not be computed."""
        slots = [_slot_of(segment) for segment in batch.segments]
        for slot in slots:
            failure = f"a shard failed to compute a step: {error}"
            self._fail(slot, SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, failure, self._shard))
            slot.resolve()
        _send_complete(_pending_of(slots))

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
        for slot in slots:
            slot.resolve()
        _send_complete(_pending_of(slots))

    def on_link_lost(self, neighbour: str, error: StitchError) -> None:
        """Fails the sessions with KV on a next shard that is lost; those of other links continue."""
        is_refusal = isinstance(error, Incompatible | OutOfStep)
        cause = shard_pb2.FAILURE_CAUSE_PRECONDITION if is_refusal else shard_pb2.FAILURE_CAUSE_UNAVAILABLE
        shard = error.shard if isinstance(error, Unavailable) else ""
        for step, segments in [] if self._in_flight is None else self._in_flight.sent_to(neighbour):
            failures = (SessionFailure(one.session.id, one.session.epoch, cause, str(error), shard) for one in segments)
            self.on_reply(neighbour, StepReply(step, failures=tuple(failures)))
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
                    again = _contradiction(f"session {received.session_id} was opened again")
                    touched += self._withdraw(pending.upstream, received.session_id, again, segments)
                segments.append(self._segment(session, rows, slot))
        _send_complete(touched)

    def _segment(self, session: Session, rows: Tensor, slot: ReplySlot) -> Segment:
        return Segment(
            session=session,
            layers=self._sessions.layers_of(session),
            position=slot.segment.position,
            length=slot.segment.length,
            wants_token=slot.segment.wants_token,
            blocks=self._pool.blocks_of(session.id),
            hidden=rows,
            reply_slot=slot,
        )

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
            slot = _slot_of(segment)
            if index not in output.non_finite:
                slot.resolve()
            if (token := output.tokens.get(index)) is not None:
                segment.session.token_ids.append(token.id)
                slot.add_token(slot.segment.epoch, token)

    def _fail_non_finite(self, segment: Segment, slot: ReplySlot, values: str) -> None:
        """Ends the session for good: a replica has the same weights, and would compute the same values."""
        session_id = slot.segment.session_id
        message = f"{values} of session {session_id} at position {segment.position} are not finite"
        self._fail(slot, SessionRefused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message))
        slot.resolve()

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


def _send_complete(replies: Iterable[PendingReply]) -> None:
    """Sends the replies whose segments are all resolved."""
    for pending in dict.fromkeys(replies):
        if pending.unresolved == 0:
            pending.send()


def _contradiction(message: str) -> SessionRefused:
    return SessionRefused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message)
