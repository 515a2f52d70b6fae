"""KV room as credit between neighbouring shards, so that no session is opened where it has no room.

`KvCredit` is the sender's side: the room of each next shard as last reported, less what was opened since. `KvGrants` is
the receiver's side: it keeps room for the links that wait for some, in order of their wishes, so that several senders
take turns instead of taking the same room at once. Both belong to the engine's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stitch_server.engine.types import Segment, Session, Upstream
from stitch_server.kv_cache.block_pool import BlockPool

# What a next shard is assumed to have room for until its first report.
INITIAL_ROOM_TOKENS = 512
# How long room is kept for a link that opens no session in it.
GRANT_SECONDS = 1.0


class RoomRequests(Protocol):
    """The links to the next shards, over which wishes for KV room are sent; does not block."""

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None: ...


@dataclass(slots=True)
class _NextShard:
    """What is known of the KV room of one next shard."""

    # None until the first report.
    reported: float | None = None
    # By session id: the expected tokens of sessions that no report counts yet.
    unreported: dict[int, int] = field(default_factory=dict)
    # The open wish in tokens; 0: none.
    wanted: int = 0

    @property
    def free(self) -> float:
        reported = INITIAL_ROOM_TOKENS if self.reported is None else self.reported
        return reported - sum(self.unreported.values())

    def holds(self, tokens: int) -> bool:
        """Whether a session of this length has room; where nothing is known, one session finds out."""
        return tokens <= self.free or (self.reported is None and not self.unreported)


class KvCredit:
    """The KV room of the next shards, as the sender of sessions knows it."""

    def __init__(self, links: RoomRequests) -> None:
        self._links = links
        self._shards: dict[str, _NextShard] = {}

    @property
    def wanting(self) -> list[str]:
        """The next shards that were asked for room and have not given it."""
        return [name for name, shard in self._shards.items() if shard.wanted]

    def free_tokens(self, name: str) -> float:
        """The room of a next shard, less that of sessions which it has not counted yet."""
        return self._shard(name).free

    def has_room(self, chain: Sequence[str], tokens: int) -> bool:
        """Whether a session of this length has room on the first shard of `chain`; asks for room where it has none.

        An empty chain needs none.
        """
        if not chain:
            return True
        shard = self._shard(chain[0])
        if shard.holds(tokens):
            return True
        # Without a report there is no link yet, or the first report is on its way.
        if shard.reported is not None and shard.wanted != tokens:
            shard.wanted = tokens
            self._links.want(chain[0], tokens, chain[1:])
        return False

    def open(self, session: Session) -> None:
        """Counts a session that is opened on its next shard; it has none where its route ends."""
        if not session.chain:
            return
        shard = self._shard(session.chain[0])
        shard.unreported[session.id] = session.expected_tokens

    def close(self, session: Session) -> None:
        """Forgets a session that ended before a report counted it."""
        if session.chain and (shard := self._shards.get(session.chain[0])) is not None:
            shard.unreported.pop(session.id, None)

    def withdraw(self, name: str) -> None:
        """Nothing waits for room on this shard any more."""
        self._shard(name).wanted = 0
        self._links.want(name, 0, ())

    def report(self, name: str, tokens: int | None, segments: Sequence[Segment]) -> None:
        """The room that a next shard reports in its reply to a step of `segments`; None: as much as is asked for."""
        shard = self._shard(name)
        shard.reported = math.inf if tokens is None else tokens
        if shard.unreported:
            for segment in segments:
                shard.unreported.pop(segment.session.id, None)

    def grant(self, name: str, tokens: int) -> None:
        """A next shard keeps room for a session of this shard."""
        shard = self._shard(name)
        shard.reported, shard.wanted = tokens + sum(shard.unreported.values()), 0

    def forget(self, name: str) -> None:
        """The link to a next shard was lost, and with it all that was known."""
        self._shards.pop(name, None)

    def _shard(self, name: str) -> _NextShard:
        return self._shards.setdefault(name, _NextShard())


@dataclass(frozen=True, slots=True)
class _Wish:
    """Room that a link waits for."""

    tokens: int
    # Names of the shards further downstream that the session passes.
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Grant:
    """Room that is kept for a link for a while."""

    tokens: int
    until: float


class KvGrants:
    """Keeps room of a block pool for the links that wish for it; the first wish is the first to be fulfilled."""

    def __init__(self, pool: BlockPool, credit: KvCredit | None, clock: Callable[[], float]) -> None:
        """`credit` is that of the shards further downstream; None on the chain's last shard."""
        self._pool = pool
        self._credit = credit
        self._clock = clock
        # At most one of each for a link; the wishes in order of arrival.
        self._wishes: dict[Upstream, _Wish] = {}
        self._grants: dict[Upstream, _Grant] = {}

    def want(self, upstream: Upstream, tokens: int, chain: tuple[str, ...]) -> None:
        """A link wishes for room, in place and in the turn of an earlier wish; 0: it no longer does."""
        if tokens:
            self._wishes[upstream] = _Wish(tokens, chain)
        else:
            self._wishes.pop(upstream, None)

    def use_grant(self, upstream: Upstream) -> None:
        """A link opened a session in the room that was kept for it."""
        self._grants.pop(upstream, None)

    def forget(self, upstream: Upstream) -> None:
        """A link ended."""
        self._wishes.pop(upstream, None)
        self._grants.pop(upstream, None)

    def give(self, to_all: bool = False) -> None:
        """Fulfils wishes for which there is room, or, with `to_all`, all of those that came over links."""
        if not self._wishes and not self._grants:
            return
        now, full = self._clock(), set[str]()
        self._grants = {upstream: grant for upstream, grant in self._grants.items() if grant.until > now}
        for upstream, wish in list(self._wishes.items()):
            at_once = to_all and not upstream.is_local
            if not at_once and self._capped(wish.tokens) > self._unclaimed():
                if to_all:
                    continue
                return
            if upstream in self._grants or not full.isdisjoint(wish.chain[:1]):
                continue
            if at_once or self._credit is None or self._credit.has_room(wish.chain, wish.tokens):
                del self._wishes[upstream]
                self._grants[upstream] = _Grant(wish.tokens, now + GRANT_SECONDS)
                upstream.grant(wish.tokens)
            else:
                full.update(wish.chain[:1])

    def fits(self, upstream: Upstream, tokens: int) -> bool:
        """Whether a link may open a session of this length now."""
        grant = self._grants.get(upstream)
        return self._capped(tokens) <= self._unclaimed() + (0 if grant is None else self._capped(grant.tokens))

    def room_for(self, upstream: Upstream) -> int:
        """The room that a link may use: what is kept for it, or all where no link waits."""
        grant = self._grants.get(upstream)
        if grant is not None:
            return grant.tokens
        return 0 if self._wishes else self._unclaimed()

    def _unclaimed(self) -> int:
        """The room that is kept for no link."""
        kept = sum(self._capped(grant.tokens) for grant in self._grants.values())
        return max(0, self._pool.room_tokens - kept)

    def _capped(self, tokens: int) -> int:
        """The tokens of whole blocks; no session gets more than the pool."""
        return min(self._pool.blocks_for(tokens) * self._pool.block_tokens, self._pool.tokens)
