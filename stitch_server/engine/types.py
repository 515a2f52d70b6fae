"""The types that the engine, the runner and `rpc` exchange: a session, a batch of its segments, and their results.

The engine composes a frozen `Batch`, the runner computes a frozen `StepOutput` from it; only a `Session` is mutable,
and only the engine's thread changes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from stitch.errors import StitchError
from stitch.grammar import Grammar
from stitch.sampling import Sampling, Token
from stitch.v1.shard_pb2 import FailureCause

if TYPE_CHECKING:
    from torch import Tensor

    from stitch_server.model.constraint import Constraint


_session_ids = itertools.count(1)


@dataclass(slots=True, eq=False)
class Session:
    """What a shard keeps of one session: the request's tokens so far, and how many of them have KV here."""

    route: str
    # Names of the downstream shards, in order.
    chain: tuple[str, ...]
    sampling: Sampling
    # The prompt and the tokens generated so far, as far as this shard knows them.
    token_ids: list[int]
    prompt_tokens: int
    # The tenant of the client; KV prefixes are shared within one.
    tenant: str = ""
    # Unique in this process, and so on the link to the next shard.
    id: int = field(default_factory=lambda: next(_session_ids))
    # The number of preemptions; replies to steps of an earlier epoch are discarded.
    epoch: int = 0
    # The KV length: tokens whose KV is cached on this shard, or being computed.
    cached: int = 0
    # Tokens of the prefix that another session had cached.
    reused: int = 0
    # Tokens of the prefix, with the `reused` ones, of which an earlier session has left the KV of the layers here up
    # to `resumed_layer` and the hidden states there: this session computes them from there on.
    resumed: int = 0
    resumed_layer: int = 0
    # The length that it is expected to have in the end, for which shards keep KV room; at least that of `token_ids`.
    expected_tokens: int = 0
    # What the generated tokens match; None: anything.
    grammar: Grammar | None = None
    # Where the route ends: the tokens that the grammar allows next.
    constraint: Constraint | None = None
    # Whether the next shard has received a segment of this epoch, and so holds KV that must be freed there.
    open_downstream: bool = False
    # W3C `traceparent` for the next shard; empty: no trace.
    traceparent: str = ""

    @property
    def next_shards(self) -> tuple[str, ...]:
        """The shards of which one receives the next step; empty on the chain's last shard."""
        return self.chain[:1]


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The layers `[first, end)` of this shard that a route passes."""

    first: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class KeptStates:
    """Hidden states of leading tokens of a segment, as an earlier session left them."""

    # The layers up to this one are computed, and their KV is in the segment's blocks.
    layer: int
    # [tokens, hidden]
    states: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive tokens of one session, computed in one pass."""

    session: Session
    layers: LayerRange
    position: int
    length: int
    # Whether the route's last shard samples a token from the logits of the last of these tokens.
    wants_token: bool
    # All KV blocks of the session, in the order of its tokens.
    blocks: Sequence[int]
    # The hidden states that the upstream shard sent, [length, hidden]; None where the pass embeds token ids.
    hidden: Tensor | None = None
    # Where the result goes: the reply to the upstream shard's step; None on the first shard.
    reply_slot: ReplySlot | None = None
    # The routes, cheapest first, of which this pass selects one for the session; empty where the route is known.
    # `layers` is then the range of the earliest cut, and the segment holds all tokens that the route probe reads.
    candidates: tuple[str, ...] = ()
    # Of its leading tokens, for which the pass begins after these.
    kept: KeptStates | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The segments of one forward pass, sorted by `in_layer_order`."""

    segments: tuple[Segment, ...]
    # Whether other steps are in flight, so that a neighbour on this machine may compute at the same time.
    pipelined: bool = False

    @property
    def num_tokens(self) -> int:
        """The tokens of all segments, which are the rows of the pass."""
        return sum(segment.length for segment in self.segments)

    def by_session(self) -> list[Batch]:
        """One batch for each session, in layer order as this one."""
        sessions = dict.fromkeys(segment.session for segment in self.segments)
        return [replace(self, segments=tuple(one for one in self.segments if one.session is s)) for s in sessions]


def in_layer_order(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Sorts segments by first layer, then by descending end, so that the tokens of any layer are the leading rows."""
    key = lambda segment: (segment.layers.first, -segment.layers.end, segment.session.route)  # noqa: E731
    return tuple(sorted(segments, key=key))


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """The route that the probe selected for a session, and why."""

    route: str
    # The score of the most expensive route, 0 to 1.
    score: float = 1.0
    # Expected gain of each route over the cheapest one, and the threshold that each but the cheapest must exceed.
    gains: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    # Why the probe could not decide and the route is the fallback route; empty where it decided.
    failure: str = ""
    # The route that the probe prefers, where that is no candidate.
    preferred: str = ""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a batch: hidden states for next shards, and the tokens sampled for routes that end here."""

    # [tokens, hidden] in the batch's order; None where all segments' routes end here.
    hidden: Tensor | None = None
    # By the index of the segment that wants a token.
    tokens: dict[int, Token] = field(default_factory=dict)
    # By index of the segment: which of its values are not finite, the incoming `hidden states` or the `logits`.
    non_finite: dict[int, str] = field(default_factory=dict)
    # By index of the segment: why no token could be sampled by the session's grammar.
    refused: dict[int, SessionRefused] = field(default_factory=dict)
    # Seconds by stage of the time to first token.
    stages: dict[str, float] = field(default_factory=dict)
    # By the index of the segment that has candidates.
    decisions: dict[int, RouteDecision] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutgoingStep:
    """One step for a next shard."""

    number: int
    segments: tuple[Segment, ...]
    # For each segment whether it is the first of its session's epoch on this link.
    opens: tuple[bool, ...]
    # The segments' rows, concatenated: [tokens, hidden].
    hidden: Tensor
    # Whether this shard computes further steps while the next shard computes this one.
    pipelined: bool
    # Whether it may overtake queued frames: no session of this step has an earlier step in flight.
    urgent: bool


@dataclass(frozen=True, slots=True)
class IncomingSegment:
    """A segment as an upstream shard describes it; id and epoch are those of its sender."""

    session_id: int
    epoch: int
    position: int
    length: int
    wants_token: bool
    # The session that this segment opens, in the state before it; None where the session is open already.
    new_session: Session | None = None


@dataclass(frozen=True, slots=True, eq=False)
class IncomingStep:
    """One step of an upstream shard."""

    number: int
    segments: tuple[IncomingSegment, ...]
    # Unpacks the segments' rows, [tokens, hidden], onto this shard's device; called in the engine's thread.
    hidden: Callable[[], Tensor]
    # Whether the upstream shard computes further steps at the same time.
    pipelined: bool


@dataclass(frozen=True, slots=True)
class SessionToken:
    """A token sampled for one session of a step; id and epoch are those of the step's sender."""

    session_id: int
    epoch: int
    token: Token


@dataclass(frozen=True, slots=True)
class SessionFailure:
    """A session that a downstream shard cannot continue; id and epoch are those of the step's sender."""

    session_id: int
    epoch: int
    cause: FailureCause
    message: str
    # The shard that is gone or doesn't answer, where the cause is one.
    shard: str = ""


@dataclass(frozen=True, slots=True)
class StepReply:
    """A downstream shard's reply to one step."""

    step: int
    tokens: tuple[SessionToken, ...] = ()
    failures: tuple[SessionFailure, ...] = ()
    # Seconds that the step spent downstream, by stage.
    stages: dict[str, float] = field(default_factory=dict)
    # The KV room for new sessions, the least of all shards from the receiver on; None: it says nothing of it.
    kv_free_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KvRoom:
    """KV room that a next shard keeps for a session of this shard."""

    neighbour: str
    tokens: int


class Upstream(Protocol):
    """The link that a step came from; its methods are called in the engine's thread."""

    @property
    def prefix_scope(self) -> str:
        """KV prefixes are shared between sessions of links with the same scope."""

    @property
    def routes(self) -> frozenset[str]:
        """Routes whose sessions go over this link."""

    def reply(self, reply: StepReply) -> None: ...

    @property
    def is_local(self) -> bool:
        """Whether the sessions are requests of this shard, which it finishes while it drains."""

    def grant(self, tokens: int) -> None:
        """Says that KV room is kept for a session of this link."""


class SessionRefused(Exception):
    """A segment that cannot be computed; its session is closed on this shard."""

    def __init__(self, cause: FailureCause, message: str, shard: str = "") -> None:
        """`shard` is the one that is gone or doesn't answer, where the cause is one."""
        super().__init__(message)
        self.cause = cause
        self.shard = shard


@dataclass(slots=True, eq=False)
class PendingReply:
    """The reply to one step, while the results of its segments are gathered."""

    upstream: Upstream
    step: IncomingStep
    received_at: float
    # Segments that are neither sampled, nor answered downstream, nor refused.
    unresolved: int
    tokens: list[SessionToken] = field(default_factory=list)
    failures: list[SessionFailure] = field(default_factory=list)
    # Seconds by stage.
    stages: dict[str, float] = field(default_factory=dict)
    # Sessions that the upstream shard closed while the step was queued.
    closed: set[int] = field(default_factory=set)
    # The least KV room of the shards further downstream; None on the chain's last shard.
    kv_free_downstream: int | None = None

    def add_seconds(self, stages: Mapping[str, float]) -> None:
        for stage, seconds in stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def add_kv_free(self, tokens: int | None) -> None:
        """The KV room that a next shard reports."""
        known = [one for one in (tokens, self.kv_free_downstream) if one is not None]
        self.kv_free_downstream = min(known, default=None)

    def send(self, kv_free_tokens: int) -> None:
        """Sends the reply, with this shard's KV room for new sessions of the link."""
        if self.kv_free_downstream is not None:
            kv_free_tokens = min(kv_free_tokens, self.kv_free_downstream)
        tokens, failures = tuple(self.tokens), tuple(self.failures)
        self.upstream.reply(StepReply(self.step.number, tokens, failures, dict(self.stages), kv_free_tokens))


@dataclass(frozen=True, slots=True, eq=False)
class ReplySlot:
    """The place of one received segment in its step's reply."""

    pending: PendingReply
    segment: IncomingSegment

    def resolve(self) -> None:
        """Counts the segment as resolved; its token or failure is added before."""
        self.pending.unresolved -= 1

    def add_token(self, epoch: int, token: Token) -> None:
        self.pending.tokens.append(SessionToken(self.segment.session_id, epoch, token))

    def add_failure(self, reason: SessionRefused) -> None:
        session_id, epoch = self.segment.session_id, self.segment.epoch
        self.pending.failures.append(SessionFailure(session_id, epoch, reason.cause, str(reason), reason.shard))


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link to a next shard ended, and with it the KV of its sessions there."""

    # The name of the next shard.
    neighbour: str
    error: StitchError


@dataclass(frozen=True, slots=True)
class LinkReply:
    """A reply that came over the link to a next shard."""

    # The name of the next shard.
    neighbour: str
    reply: StepReply


LinkEvent = LinkReply | KvRoom | LinkLost
