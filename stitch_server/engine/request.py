"""One generation as the first shard of its chain drives it, from the prompt to the last token.

The engine's thread owns a `Request`; its client receives frozen `RequestOutput`s through `on_output`. Invariant: the
client receives at most one finish reason or error, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from stitch.errors import StitchError
from stitch.sampling import Token
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason
from stitch_server.engine.types import RouteDecision, Session


class RequestStatus(Enum):
    """Where a request is in its life; only a `RUNNING` one holds KV blocks."""

    WAITING = auto()
    RUNNING = auto()
    # Queued again: its KV was freed, and its tokens will be recomputed.
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One message to a request's client: a route decision, a token with or without a finish reason, or an error."""

    token: Token | None = None
    finish_reason: FinishReason | None = None
    # With the first token: the time to first token in seconds by stage, and the length of the prefix that was cached.
    stages: dict[str, float] = field(default_factory=dict)
    cached_tokens: int = 0
    error: StitchError | None = None
    decision: RouteDecision | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a prompt, and when their hidden states were sent, in seconds of the engine's clock."""

    position: int
    length: int
    sent_at: float


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Session):
    """A session that this shard drives."""

    # The downstream shards of each route, cheapest first, while the probe is to select the route; `route` and `chain`
    # are empty until then.
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    context_length: int
    # The rows of this shard's embedding, which every token but the last one of an answer has to have.
    vocabulary_size: int
    # Called in the engine's thread; must not block.
    on_output: Callable[[RequestOutput], None]
    status: RequestStatus = RequestStatus.WAITING
    # The tenant's share of this shard, relative to other tenants.
    tenant_weight: float = 1.0
    # Seconds of the engine's clock. At its deadline a request that waits is dropped; None: it has none.
    deadline: float | None = None
    arrived_at: float = 0.0
    first_scheduled_at: float | None = None
    last_sent_at: float = 0.0
    first_token_at: float | None = None
    # What was sent before the first token.
    chunks: list[Chunk] = field(default_factory=list)
    # The scheduler's pass that last held tokens of this request.
    last_pass: int = 0
    # Whether a downstream shard no longer had the prefix, so that this request recomputes all of its tokens.
    skip_prefix_cache: bool = False

    @property
    def awaits_route(self) -> bool:
        """Whether the probe is to select the route in the first pass."""
        return bool(self.candidates)

    @property
    def next_shards(self) -> tuple[str, ...]:
        """The shards of which one receives the next step: those of all candidates until the route is selected."""
        if not self.candidates:
            return self.chain[:1]
        return tuple(dict.fromkeys(chain[0] for chain in self.candidates.values() if chain))

    @property
    def may_end_here(self) -> bool:
        """Whether its route, or one of its candidates, ends on this shard."""
        return () in self.candidates.values() if self.candidates else not self.chain

    @property
    def remaining(self) -> int:
        """The number of known tokens that are not computed yet."""
        return len(self.token_ids) - self.cached

    @property
    def is_decoding(self) -> bool:
        """Whether the next pass computes one sampled token rather than a chunk of the prompt."""
        return self.first_token_at is not None and self.remaining <= 1

    @property
    def generated(self) -> int:
        """The number of tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    def take_route(self, decision: RouteDecision) -> None:
        """Fixes the route, also for recomputation after a preemption, and reports it."""
        self.route, self.chain = decision.route, self.candidates[decision.route]
        self.candidates = {}
        self.on_output(RequestOutput(decision=decision))

    def finish_reason_at(self, token: Token) -> FinishReason | None:
        """The reason why `token`, just appended, is the last one; None where generation continues."""
        if self.sampling.ends_at(token.id, self.generated):
            return FINISH_REASON_STOP
        if self.generated >= self.sampling.max_tokens or len(self.token_ids) >= self.context_length:
            return FINISH_REASON_LENGTH
        return None

    def reset_for_recompute(self) -> None:
        """Starts a new epoch with no KV; the tokens stay."""
        self.epoch += 1
        self.cached = self.reused = self.resumed = 0
        self.open_downstream = False
