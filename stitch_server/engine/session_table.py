"""The sessions that the shards before this one have opened here, and whether what they send fits. Knows no results.

What is freed here is freed behind as well: a shard behind hears of a session's end from nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.types import LayerRange, Session, StepReply
from stitch_server.kv_cache.block_pool import BlockPool


class Upstream(Protocol):
    """The link that a step came from; `reply` is callable from the engine's thread."""

    def reply(self, reply: StepReply) -> None: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session's first segment says of it."""

    route: str
    chain: tuple[str, ...]
    sampling: Sampling
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class ReceivedSegment:
    session: int
    epoch: int
    position: int
    length: int
    wants_token: bool
    opening: Opening | None


class Refused(Exception):
    """A segment that can't be computed; its session is closed here."""

    def __init__(self, cause: FailureCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class _Ended:
    """Why an epoch of a session can't go on."""

    epoch: int
    cause: FailureCause
    message: str


class SessionTable:
    """Keeps the sequences of every link, and their KV blocks."""

    def __init__(self, pool: BlockPool, cuts: Mapping[str, LayerRange], forwarding: StepsInFlight | None) -> None:
        self._pool = pool
        self._cuts = cuts
        # None on the last shard of the chain.
        self._forwarding = forwarding
        self._sequences: dict[Upstream, dict[int, Session]] = {}
        # Why a session ended here, until its neighbour closes it: steps of it that are on their way hear the same.
        self._ended: dict[Upstream, dict[int, _Ended]] = {}

    def __len__(self) -> int:
        # A copy, since metrics are read from another thread.
        return sum(len(sequences) for sequences in list(self._sequences.values()))

    def accept(self, upstream: Upstream, segment: ReceivedSegment, closed: bool = False) -> Session:
        """The segment's sequence, with room for it in the cache; raises Refused.

        `closed`: the session was closed after the segment was sent, so that it must not be opened.
        """
        known = segment.session in self._sequences.get(upstream, {})
        opening = None if closed else segment.opening
        try:
            if opening is not None:
                self._open(upstream, segment, opening)
            return self._continued(upstream, segment)
        except Refused as reason:
            if known or opening is not None:
                self._bury(upstream, segment.session, segment.epoch, reason)
            raise

    def _continued(self, upstream: Upstream, segment: ReceivedSegment) -> Session:
        sequence = self._sequences.get(upstream, {}).get(segment.session)
        if sequence is None:
            raise self._why_not_open(upstream, segment)
        expected = (sequence.epoch, sequence.cached)
        if (segment.epoch, segment.position) != expected:
            raise _contradiction(
                f"session {segment.session} sends epoch {segment.epoch}, position {segment.position}, "
                f"but epoch {expected[0]}, position {expected[1]} comes next"
            )
        self._make_room(sequence, sequence.cached + segment.length, segment.session)
        sequence.cached += segment.length
        return sequence

    def _make_room(self, sequence: Session, tokens: int, session: int) -> None:
        if self._pool.grow(sequence.id, tokens):
            return
        if tokens > self._pool.tokens:
            message = f"session {session} has {tokens} tokens, but the KV cache holds {self._pool.tokens}"
            raise Refused(shard_pb2.FAILURE_CAUSE_TOO_LONG, message)
        raise Refused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, f"no KV block is free for session {session}")

    def remove(self, upstream: Upstream, session: int) -> None:
        """The neighbour closes the session. Unknown ones are fine: closing twice does no harm."""
        self._ended.get(upstream, {}).pop(session, None)
        sequence = self._sequences.get(upstream, {}).pop(session, None)
        if sequence is not None:
            self._free(sequence)

    def end(self, upstream: Upstream, session: int, epoch: int, reason: Refused) -> Refused:
        """The session can't go on here, unless it was closed or has begun anew since; returns the first reason."""
        ended = self._ended.get(upstream, {}).get(session)
        if ended is not None and ended.epoch == epoch:
            return Refused(ended.cause, ended.message)
        sequence = self._sequences.get(upstream, {}).get(session)
        if sequence is not None and sequence.epoch == epoch:
            self._bury(upstream, session, epoch, reason)
        return reason

    def remove_all(self, upstream: Upstream) -> None:
        """A link ended, and with it all of its sessions."""
        self._ended.pop(upstream, None)
        for sequence in self._sequences.pop(upstream, {}).values():
            self._free(sequence)

    def lose(self, address: str, message: str) -> None:
        """A shard behind is gone, and with it its part of these sessions: whoever goes on with one hears of it."""
        reason = Refused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, message)
        for upstream, sequences in self._sequences.items():
            for session, sequence in list(sequences.items()):
                if sequence.open_downstream and sequence.chain[0] == address:
                    self.end(upstream, session, sequence.epoch, reason)

    def layers(self, sequence: Session) -> LayerRange:
        return self._cuts[sequence.route]

    def _bury(self, upstream: Upstream, session: int, epoch: int, reason: Refused) -> None:
        self.remove(upstream, session)
        self._ended.setdefault(upstream, {})[session] = _Ended(epoch, reason.cause, str(reason))

    def _why_not_open(self, upstream: Upstream, segment: ReceivedSegment) -> Refused:
        ended = self._ended.get(upstream, {}).get(segment.session)
        if ended is None or ended.epoch != segment.epoch:
            return _contradiction(f"session {segment.session} is not open here")
        return Refused(ended.cause, ended.message)

    def _free(self, sequence: Session) -> None:
        self._pool.release(sequence.id)
        if sequence.open_downstream and self._forwarding is not None:
            self._forwarding.close(sequence.chain, sequence.id)

    def _open(self, upstream: Upstream, segment: ReceivedSegment, opening: Opening) -> None:
        if opening.route not in self._cuts:
            raise _contradiction(f"route {opening.route} does not pass this shard, only {', '.join(self._cuts)}")
        last = self._forwarding is None
        if last != (not opening.chain):
            side = "the last of its chain" if last else "not the last of its chain"
            raise _contradiction(f"the session names {len(opening.chain)} shards behind this one, which is {side}")
        reused_blocks, over = divmod(opening.reused_tokens, self._pool.block_tokens)
        if over:
            whole = f"no whole blocks of {self._pool.block_tokens}"
            raise _contradiction(f"{opening.reused_tokens} reused tokens are {whole}")
        sequence = Session(
            route=opening.route,
            chain=opening.chain,
            sampling=opening.sampling,
            token_ids=list(opening.token_ids),
            prompt_tokens=opening.prompt_tokens,
            epoch=segment.epoch,
            cached=opening.reused_tokens,
            reused=opening.reused_tokens,
        )
        hashes = self._pool.hashes(sequence.route, sequence.token_ids[: sequence.prompt_tokens])
        if not self._pool.begin(sequence.id, hashes, reused_blocks):
            message = f"the first {opening.reused_tokens} tokens of session {segment.session} are not here"
            raise Refused(shard_pb2.FAILURE_CAUSE_PREFIX_MISSING, message)
        self.remove(upstream, segment.session)
        self._sequences.setdefault(upstream, {})[segment.session] = sequence


def _contradiction(message: str) -> Refused:
    return Refused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message)
