"""One generation on the first shard of its chain, from the prompt to the last token. Knows no RPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stitch.errors import StitchError
from stitch.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason
from stitch_server.engine.types import RouteDecision, Session, Token


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a session's client hears: a token, perhaps the end, or an error instead of both; a verdict before all."""

    token: Token | None = None
    finish_reason: FinishReason | None = None
    # With the first token: seconds by stage.
    stages: dict[str, float] = field(default_factory=dict)
    error: StitchError | None = None
    decision: RouteDecision | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Session):
    """A sequence that this shard drives."""

    # The shards behind by route, cheapest first, while it is still to be decided; then `route` and `chain` are empty.
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    context_length: int
    # Called in the engine's thread; must not block.
    report: Callable[[RequestOutput], None]
    # Seconds of the engine's clock.
    arrived: float = 0.0
    first_scheduled: float = 0.0
    last_sent: float = 0.0
    answered: bool = False
    # The step in which it was last scheduled, so that the longest waiting goes first.
    turn: int = 0
    # Not to be admitted before this time, after a shard behind had no room for it.
    not_before: float = 0.0
    # How many leading tokens others may have left behind are not to be counted on any more.
    reusable: bool = True

    @property
    def undecided(self) -> bool:
        """Whether its first pass is to decide its route."""
        return bool(self.candidates)

    def settle(self, decision: RouteDecision) -> None:
        """It takes this route from now on, also when it begins anew."""
        self.route, self.chain = decision.route, self.candidates[decision.route]
        self.candidates = {}
        self.report(RequestOutput(decision=decision))

    @property
    def remaining(self) -> int:
        """Tokens that are known but not yet computed."""
        return len(self.token_ids) - self.cached

    @property
    def decoding(self) -> bool:
        """Whether its next step feeds one sampled token, rather than a part of the prompt."""
        return self.answered and self.remaining <= 1

    def finish_after(self, token: Token) -> FinishReason | None:
        """Why `token`, just appended, is the last one; None where it isn't."""
        if token.id in self.sampling.stop_token_ids:
            return FINISH_REASON_STOP
        generated = len(self.token_ids) - self.prompt_tokens
        if generated >= self.sampling.max_tokens or len(self.token_ids) >= self.context_length:
            return FINISH_REASON_LENGTH
        return None

    def reset_for_recompute(self) -> None:
        """Forgets what is computed, not what is known."""
        self.epoch += 1
        self.cached = self.reused = 0
        self.open_downstream = False
