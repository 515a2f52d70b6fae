"""The sessions that links have opened on a shard, with their KV blocks.

In: the segments of upstream shards. Out: a session with blocks for each segment, or the reason why there is none.
Invariants: a session belongs to the link that opened it, and whatever an opening claims is within the limits of this
shard; KV that is computed from one link's hidden states is found by sessions of the same upstream shard alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stitch.errors import InvalidRequest, Unavailable, plain
from stitch.grammar import Grammar
from stitch.v1 import shard_pb2
from stitch.v1.shard_pb2 import FailureCause
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.kv_room import KvGrants
from stitch_server.engine.types import IncomingSegment, LayerRange, Session, SessionRefused, Upstream

if TYPE_CHECKING:
    from stitch_server.model.constraint import Constraint

# Token ids are 32 bits wide.
UNLIMITED = 1 << 32
# Takes a route, and the names of the shards that a session takes after this one; raises InvalidRequest where these are
# not those of the route, Unavailable where one is not in the cluster.
CheckChain = Callable[[str, Sequence[str]], None]
# Takes a grammar, the tokens generated so far, and those that end an answer.
Constrain = Callable[[Grammar, Sequence[int], Sequence[int]], "Constraint"]
MAX_TENANT_CHARACTERS = 256
MAX_STOP_TOKENS = 2_048
# Token ids that the open sessions of one link may hold, for each token of the KV cache; sessions that share a prefix
# hold more of them than blocks.
MAX_IDS_PER_KV_TOKEN = 64


@dataclass(frozen=True, slots=True)
class OpeningLimits:
    """What the opening of a session may claim."""

    # Tokens of prompt and answer together.
    context_length: int = UNLIMITED
    # The tokens of a prompt are below it.
    vocabulary_size: int = UNLIMITED
    # Where routes end: the logits of the head, which every forced or biased token must be one of.
    logits: int = UNLIMITED

    def check(self, session: Session) -> None:
        """Raises SessionRefused for a field outside of its limits."""
        tokens, forced = len(session.token_ids), session.sampling.forced_token_ids
        if not 1 <= tokens <= self.context_length:
            raise contradiction(f"a session opens with {tokens} tokens, but the context holds {self.context_length}")
        if not 1 <= session.prompt_tokens <= tokens:
            raise contradiction(f"a session opens with a prompt of {session.prompt_tokens} of {tokens} tokens")
        if (largest := max(session.token_ids)) >= self.vocabulary_size:
            raise contradiction(f"token {largest} opens a session, but tokens are below {self.vocabulary_size}")
        if len(forced) > self.context_length or len(session.sampling.stop_token_ids) > MAX_STOP_TOKENS:
            counts = f"{len(forced)} forced and {len(session.sampling.stop_token_ids)} stop tokens"
            limits = f"{self.context_length} and {MAX_STOP_TOKENS} are the limits"
            raise contradiction(f"a session opens with {counts}, but {limits}")
        biased = (token_id for token_id, _ in session.sampling.logit_bias)
        if (largest := max((*forced, *biased), default=0)) >= self.logits:
            raise contradiction(f"token {largest} is forced or biased, but the head has {self.logits} logits")
        if len(session.tenant) > MAX_TENANT_CHARACTERS:
            raise contradiction(f"the tenant has {len(session.tenant)} characters, but at most {MAX_TENANT_CHARACTERS}")


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
        kept: KeptPrefixes,
        layer_ranges: Mapping[str, LayerRange],
        in_flight: StepsInFlight | None,
        check_chain: CheckChain,
        limits: OpeningLimits,
        clock: Callable[[], float] = time.perf_counter,
        constrain: Constrain | None = None,
    ) -> None:
        """`kept` has the KV blocks of the sessions, and the hidden states of their prefixes.

        `in_flight` is None where every route ends on this shard; `constrain` is for those that do.
        """
        self._pool = kept.pool
        self._kept = kept
        self.grants = KvGrants(kept.pool, None if in_flight is None else in_flight.credit, clock)
        self._layer_ranges = layer_ranges
        self._in_flight = in_flight
        self._check_chain = check_chain
        self._limits = limits
        self._constrain = constrain
        self._sessions: dict[Upstream, dict[int, Session]] = {}
        self._tombstones: dict[Upstream, dict[int, _Tombstone]] = {}
        # By id on this shard, in the order in which they were opened: the link and the id there.
        self._by_age: dict[int, tuple[Upstream, int]] = {}
        # Sessions that were preempted and whose segments of the next batch are to be withdrawn.
        self._preempted: list[tuple[Upstream, int, SessionRefused]] = []
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

    def take_preempted(self) -> list[tuple[Upstream, int, SessionRefused]]:
        """The sessions that were preempted since the last call, by link and id, each with the reason."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def next_shards(self, upstream: Upstream, segment: IncomingSegment) -> tuple[str, ...]:
        """The shard to which the segment goes on; none from its route's last shard, or for an unknown session."""
        session = segment.new_session or self._sessions.get(upstream, {}).get(segment.session_id)
        return () if session is None else session.next_shards

    def want(self, upstream: Upstream, tokens: int, chain: tuple[str, ...]) -> None:
        """A link wishes for KV room; 0 tokens: no longer. A wish on a chain of none of its routes has no effect."""
        if not tokens or any(self._is_chain_of(route, chain) for route in upstream.routes):
            self.grants.want(upstream, tokens, chain)

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
        self.grants.forget(upstream)
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
        if self.is_draining and not upstream.is_local:
            message = "a shard of the chain is draining and takes no new sessions"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_DRAINING, message)
        if session.route not in self._layer_ranges:
            named = plain(session.route, MAX_TENANT_CHARACTERS)
            raise contradiction(f"route {named} does not pass this shard, only {', '.join(self._layer_ranges)}")
        if session.route not in upstream.routes:
            raise contradiction(f"route {session.route} does not come over this link, only {sorted(upstream.routes)}")
        self._limits.check(session)
        self._check_downstream(session)
        self._check_memory(upstream, session)
        if self._in_flight is not None and (suspect := self._in_flight.refusal(session.next_shards)) is not None:
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, str(suspect), suspect.shard)
        reused_blocks, rest = divmod(session.reused, self._pool.block_tokens)
        if rest:
            raise contradiction(f"{session.reused} reused tokens are no whole blocks of {self._pool.block_tokens}")
        self.close(upstream, session_id)
        expected = self._check_room(upstream, session_id, session)
        # Also on the next shards, which get the tenant from here.
        session.tenant = _scoped(upstream.prefix_scope, session.tenant)
        hashes = self._pool.hashes(session.tenant, session.route, session.token_ids[: session.prompt_tokens])
        if not self._kept.begin(session, hashes, reused_blocks, expected):
            message = f"the first {session.reused} tokens of session {session_id} are not cached"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_PREFIX_MISSING, message)
        self.grants.use_grant(upstream)
        if session.grammar is not None and self._constrain is not None and not session.chain:
            generated = session.token_ids[session.prompt_tokens :]
            session.constraint = self._constrain(session.grammar, generated, session.sampling.stop_token_ids)
        if self._in_flight is not None:
            self._in_flight.credit.open(session)
        self._sessions.setdefault(upstream, {})[session_id] = session
        self._by_age[session.id] = (upstream, session_id)

    def _check_room(self, upstream: Upstream, session_id: int, session: Session) -> int:
        """The tokens for which KV room is kept. Raises SessionRefused before anything of the session is computed."""
        known = len(session.token_ids)
        expected = max(known, min(session.expected_tokens, self._pool.tokens))
        if known > self._pool.tokens:
            raise self._too_long(session_id, known)
        if not self.grants.fits(upstream, expected):
            message = f"session {session_id} is expected to have {expected} tokens, for which there is no KV room"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, message)
        return expected

    def _check_downstream(self, session: Session) -> None:
        """Refuses a session that continues on shards other than those of its route."""
        try:
            self._check_chain(session.route, session.chain)
        except InvalidRequest as error:
            raise contradiction(str(error)) from error
        except Unavailable as error:
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_UNAVAILABLE, str(error), error.shard) from error

    def _is_chain_of(self, route: str, chain: tuple[str, ...]) -> bool:
        try:
            self._check_chain(route, chain)
        except (InvalidRequest, Unavailable):
            return False
        return True

    def _check_memory(self, upstream: Upstream, session: Session) -> None:
        """Refuses a session while its link's sessions hold too many token ids, which take memory without KV blocks."""
        held = sum(len(one.token_ids) for one in self._sessions.get(upstream, {}).values())
        limit = MAX_IDS_PER_KV_TOKEN * self._pool.tokens
        if held + len(session.token_ids) > limit:
            message = f"the sessions of this link hold {held} token ids, and {limit} is the limit"
            raise SessionRefused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, message)

    def _extend(self, upstream: Upstream, segment: IncomingSegment) -> Session:
        """Advances the segment's session by the segment, which must continue exactly where the session is."""
        session = self._sessions.get(upstream, {}).get(segment.session_id)
        if session is None:
            raise self._why_not_open(upstream, segment)
        if (segment.epoch, segment.position) != (session.epoch, session.cached):
            raise contradiction(
                f"session {segment.session_id} sends epoch {segment.epoch}, position {segment.position}, "
                f"but epoch {session.epoch}, position {session.cached} comes next"
            )
        tokens = session.cached + segment.length
        if tokens > self._limits.context_length:
            message = f"session {segment.session_id} has {tokens} tokens"
            raise contradiction(f"{message}, but the context holds {self._limits.context_length}")
        self._grow(session, tokens, segment.session_id)
        session.cached += segment.length
        return session

    def _grow(self, session: Session, tokens: int, session_id: int) -> None:
        """Preempts the youngest sessions until this one has room. Raises SessionRefused where it is the youngest."""
        if tokens > self._pool.tokens:
            raise self._too_long(session_id, tokens)
        while not self._pool.grow(session.id, tokens):
            youngest = next(reversed(self._by_age))
            upstream, its_id = self._by_age[youngest]
            message = f"no KV block is free for session {its_id}, the youngest"
            reason = SessionRefused(shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, message)
            if youngest == session.id:
                raise reason
            self._replace_by_tombstone(upstream, its_id, self._sessions[upstream][its_id].epoch, reason)
            self._preempted.append((upstream, its_id, reason))

    def _too_long(self, session_id: int, tokens: int) -> SessionRefused:
        message = f"session {session_id} has {tokens} tokens, but the KV cache holds {self._pool.tokens}"
        return SessionRefused(shard_pb2.FAILURE_CAUSE_TOO_LONG, message)

    def _why_not_open(self, upstream: Upstream, segment: IncomingSegment) -> SessionRefused:
        tombstone = self._tombstones.get(upstream, {}).get(segment.session_id)
        if tombstone is None or tombstone.epoch != segment.epoch:
            return contradiction(f"session {segment.session_id} is not open here")
        return tombstone.reason

    def _replace_by_tombstone(self, upstream: Upstream, session_id: int, epoch: int, reason: SessionRefused) -> None:
        self.close(upstream, session_id)
        self._tombstones.setdefault(upstream, {})[session_id] = _Tombstone(
            epoch, reason.cause, str(reason), reason.shard
        )

    def _free(self, session: Session) -> None:
        self._pool.release(session.id)
        del self._by_age[session.id]
        if self._in_flight is not None:
            self._in_flight.close_session(session)


def _scoped(scope: str, tenant: str) -> str:
    """A tenant that differs between scopes, and so its KV prefixes; of one length on every shard of the chain."""
    return hashlib.sha256(f"{scope}\0{tenant}".encode()).hexdigest()


def contradiction(message: str) -> SessionRefused:
    """The refusal of a segment that contradicts this shard's state or limits."""
    return SessionRefused(shard_pb2.FAILURE_CAUSE_PRECONDITION, message)
