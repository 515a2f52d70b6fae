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
from stitch_server.cache.pool import BLOCK_TOKENS, BlockPool, prefix_hashes
from stitch_server.engine.batch import Cut
from stitch_server.engine.forwarding import Forwarding, Reply
from stitch_server.engine.sequence import Sequence


class Upstream(Protocol):
    """The link that a step came from; `reply` is callable from the engine's thread."""

    def reply(self, reply: Reply) -> None: ...


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


class Intake:
    """Keeps the sequences of every link, and their KV blocks."""

    def __init__(self, pool: BlockPool, cuts: Mapping[str, Cut], forwarding: Forwarding | None) -> None:
        self._pool = pool
        self._cuts = cuts
        # None on the last shard of the chain.
        self._forwarding = forwarding
        self._sequences: dict[Upstream, dict[int, Sequence]] = {}

    def __len__(self) -> int:
        # A copy, since metrics are read from another thread.
        return sum(len(sequences) for sequences in list(self._sequences.values()))

    def accept(self, upstream: Upstream, segment: ReceivedSegment, closed: bool = False) -> Sequence:
        """The segment's sequence, with room for it in the cache; raises Refused.

        `closed`: the session was closed after the segment was sent, so that it must not be opened.
        """
        if segment.opening is not None and not closed:
            self._open(upstream, segment, segment.opening)
        sequence = self._sequences.get(upstream, {}).get(segment.session)
        if sequence is None:
            raise _contradiction(f"session {segment.session} is not open here")
        if sequence.lost:
            self.remove(upstream, segment.session)
            raise Refused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, sequence.lost)
        expected = (sequence.epoch, sequence.cached)
        if (segment.epoch, segment.position) != expected:
            self.remove(upstream, segment.session)
            raise _contradiction(
                f"session {segment.session} sends epoch {segment.epoch}, position {segment.position}, "
                f"but epoch {expected[0]}, position {expected[1]} comes next"
            )
        if not self._pool.grow(sequence.number, sequence.cached + segment.length):
            self.remove(upstream, segment.session)
            raise Refused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, f"no KV block is free for session {segment.session}")
        sequence.cached += segment.length
        return sequence

    def remove(self, upstream: Upstream, session: int) -> None:
        """The session is over. Unknown ones are fine: closing twice does no harm."""
        sequence = self._sequences.get(upstream, {}).pop(session, None)
        if sequence is not None:
            self._free(sequence)

    def remove_epoch(self, upstream: Upstream, session: int, epoch: int) -> None:
        """The same, unless the session has begun anew since."""
        sequence = self._sequences.get(upstream, {}).get(session)
        if sequence is not None and sequence.epoch == epoch:
            self.remove(upstream, session)

    def remove_all(self, upstream: Upstream) -> None:
        """A link ended, and with it all of its sessions."""
        for sequence in self._sequences.pop(upstream, {}).values():
            self._free(sequence)

    def lose(self, address: str, message: str) -> None:
        """A shard behind is gone, and with it its part of these sessions: whoever goes on with one hears of it."""
        for sequences in self._sequences.values():
            for sequence in sequences.values():
                if sequence.opened and sequence.chain[0] == address:
                    sequence.lost = message

    def cut(self, sequence: Sequence) -> Cut:
        return self._cuts[sequence.route]

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.number)
        if sequence.opened and self._forwarding is not None:
            self._forwarding.close(sequence.chain, sequence.number)

    def _open(self, upstream: Upstream, segment: ReceivedSegment, opening: Opening) -> None:
        if opening.route not in self._cuts:
            raise _contradiction(f"route {opening.route} does not pass this shard, only {', '.join(self._cuts)}")
        last = self._forwarding is None
        if last != (not opening.chain):
            side = "the last of its chain" if last else "not the last of its chain"
            raise _contradiction(f"the session names {len(opening.chain)} shards behind this one, which is {side}")
        if opening.reused_tokens % BLOCK_TOKENS:
            raise _contradiction(f"{opening.reused_tokens} reused tokens are no whole blocks of {BLOCK_TOKENS}")
        sequence = Sequence(
            route=opening.route,
            chain=opening.chain,
            sampling=opening.sampling,
            token_ids=list(opening.token_ids),
            prompt_tokens=opening.prompt_tokens,
            epoch=segment.epoch,
            cached=opening.reused_tokens,
            reused=opening.reused_tokens,
        )
        hashes = prefix_hashes(sequence.route, sequence.token_ids[: sequence.prompt_tokens])
        if not self._pool.begin(sequence.number, hashes, opening.reused_tokens // BLOCK_TOKENS):
            message = f"the first {opening.reused_tokens} tokens of session {segment.session} are not here"
            raise Refused(shard_pb2.FAILURE_CAUSE_PREFIX_MISSING, message)
        self.remove(upstream, segment.session)
        self._sequences.setdefault(upstream, {})[segment.session] = sequence


def _contradiction(message: str) -> Refused:
    return Refused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message)
