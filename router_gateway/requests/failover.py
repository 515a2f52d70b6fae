"""Chooses the chains of one answer, one after another as they fail, and decides when to give up.

Another chain is tried at once. A chain that already failed is tried again when a pause has passed since, which doubles
with every failure, or when the shards' state has changed; so is the search where no chain accepts requests. Every new
token clears the record of failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import Field

from router_gateway.metrics import Metrics
from router_gateway.shards.compatibility import Facts
from router_gateway.shards.placement import NO_PROMPT, Chain, PlacedSession, Placement, Prompt
from router_gateway.shards.registry import ShardRegistry
from stitch.errors import Exhausted, StitchError, Unavailable
from stitch.settings import Settings
from stitch.telemetry import NO_SPAN, Span


class RetryPolicy(Settings):
    """How long a broken answer is retried; both limits restart with every token."""

    # From the first failure on.
    wait_seconds: float = Field(default=5.0, ge=0)
    # Before a chain that failed is tried again.
    first_pause_seconds: float = Field(default=0.1, gt=0)
    # A session that crashes its shard must not crash every shard.
    max_failures: int = Field(default=5, ge=0)
    # How long an answer waits for polls that say why its chain failed.
    refresh_seconds: float = Field(default=0.25, gt=0)


class ChainLost(Exception):
    """The session's chain failed, and another one may continue; `cause` is one of metrics.REPLAY_CAUSES.

    `shard` is the one that failed, where that is known. `final` is what the client gets where no chain continues.
    """

    def __init__(self, cause: str, message: str, shard: str = "", final: StitchError | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.shard = shard
        self.final = final


@dataclass(frozen=True, slots=True)
class FailoverDependencies:
    """What the failovers of all answers share."""

    registry: ShardRegistry
    placement: Placement
    metrics: Metrics
    policy: RetryPolicy
    # Monotonic seconds.
    clock: Callable[[], float]


@dataclass(slots=True)
class FailureRecord:
    """The failures since the last token."""

    count: int = 0
    # By the name of a shard.
    by_shard: Counter[str] = field(default_factory=Counter)
    # When each chain failed last, by the names of its shards.
    chains: dict[tuple[str, ...], float] = field(default_factory=dict)
    # When the first one was.
    since: float | None = None
    last_error: Exception | None = None


class Failover:
    """The chains of one answer. `facts` are what their shards must have in common, such as the gateway's tokenizer.

    Replays are events of `span`.
    """

    def __init__(
        self,
        routes: tuple[str, ...],
        dependencies: FailoverDependencies,
        facts: Facts,
        prompt: Prompt = NO_PROMPT,
        preferred: Chain | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        self._span = span
        # The candidates between which a first shard decides, or the one route of the answer.
        self.routes = routes
        self._dependencies = dependencies
        self._facts = facts
        self._prompt = prompt
        # The session that has computed the prompt.
        self._computed_by: PlacedSession | None = None
        self._failures = FailureRecord()
        # KV tokens that the answer may need.
        self._reserved_tokens = 0
        # Generated tokens when the current chain was chosen.
        self._tokens_at_start = 0
        # The first choice, where its shards accept requests: they have cached the prompt.
        self._preferred = preferred
        # How often the answer went on with another chain.
        self.replays = 0

    def fix_route(self, route: str) -> None:
        """The first shard has decided: every further chain is of this route."""
        self.routes = (route,)

    def record_progress(self, session: PlacedSession) -> None:
        """A token came: clears the record. From the first one on, only shards with the same facts continue."""
        if self._failures.count or self._failures.last_error is not None:
            self._failures = FailureRecord()
        self._facts = session.facts
        if self._computed_by is not session:
            self._computed_by = session
            tenant, token_ids = self._prompt
            self._dependencies.placement.prefixes.record(tenant, self.routes[0], token_ids, session.chain.names)

    async def record_failure(self, session: PlacedSession, error: ChainLost | Exhausted, generated_tokens: int) -> None:
        """Records that the session was lost. Raises the error for the client after too many failures.

        A shard that began to drain since its last poll refuses the session: the poll after the failure finds that
        out, and the refusal counts as one, not as a failure of the chain. A new request that is refused for want of
        room is tried once on every chain.
        """
        failures, chain, now = self._failures, session.chain, self._dependencies.clock()
        failures.since = now if failures.since is None else failures.since
        # Placement prefers other shards, also where no poll has shown which of these fails or drains.
        named = isinstance(error, ChainLost) and error.shard in chain.names
        failures.by_shard.update([error.shard] if isinstance(error, ChainLost) and named else chain.names)
        failures.chains[chain.names] = now
        if isinstance(error, ChainLost):
            await self._find_reason(session, error, named)
            if self._is_drain_refusal(chain, error, generated_tokens):
                self._dependencies.metrics.drain_refusals.inc()
                failures.last_error = Unavailable(str(error))
                return
            session.lost(error.shard if named else "", str(error), at_once=error.cause == "incompatible")
        failures.last_error = error
        if isinstance(error, Exhausted) and not generated_tokens:
            # Also one that failed long ago has been tried.
            other = self._choose(allow_failed=True)
            if other is None or other.names in failures.chains:
                raise error
            return
        failures.count += 1
        if failures.count > self._dependencies.policy.max_failures:
            raise self._final_error(generated_tokens)

    async def next_chain(self, reserved_tokens: int, generated_tokens: int) -> Chain:
        """The chain to try now, for `reserved_tokens` of KV. Raises Unavailable or Exhausted where there is none."""
        self._reserved_tokens = reserved_tokens
        paused = False
        while (chain := self._choose(allow_failed=paused)) is None:
            await self._pause(generated_tokens)
            paused = True
        if isinstance(error := self._failures.last_error, ChainLost):
            self._dependencies.metrics.replays.labels(cause=error.cause).inc()
            self.replays += 1
            replay = {"stitch.replay.cause": error.cause, "stitch.replay.shard": error.shard}
            self._span.event("replay", {**replay, "stitch.generated_tokens": generated_tokens})
        self._tokens_at_start = generated_tokens
        return chain

    def place(self, chain: Chain, length: int) -> PlacedSession:
        """A session of `length` tokens for the chain that was just chosen."""
        return self._dependencies.placement.place(chain, length, self._reserved_tokens)

    async def _find_reason(self, session: PlacedSession, error: ChainLost, named: bool) -> None:
        """Polls the chain's shards where the error does not say which of them is gone, drains or differs."""
        if error.cause in ("draining", "incompatible") or (error.cause == "unavailable" and not named):
            serving = [replica for replica in session.chain.replicas if replica.serving]
            await self._dependencies.registry.refresh(serving, self._dependencies.policy.refresh_seconds)

    def _is_drain_refusal(self, chain: Chain, error: ChainLost | Exhausted, generated_tokens: int) -> bool:
        """A shard may also end before its answer is read; then the poll knows less than the error."""
        refused = isinstance(error, ChainLost) and (
            error.cause == "draining" or (error.cause == "unavailable" and chain.draining)
        )
        return refused and generated_tokens == self._tokens_at_start

    def _choose(self, allow_failed: bool) -> Chain | None:
        """None: there is none, or the best one failed just now and that is not allowed."""
        placement, by_shard = self._dependencies.placement, self._failures.by_shard
        chain = (
            placement.choose(self.routes[0], by_shard, self._reserved_tokens, self._facts, self._prompt)
            if len(self.routes) == 1
            else placement.choose_candidates(self.routes, by_shard, self._reserved_tokens, self._facts, self._prompt)
        )
        preferred, self._preferred = self._preferred, None
        if (
            chain is not None
            and preferred is not None
            and all(one.accepts_requests and not one.avoided for one in preferred.replicas)
        ):
            return preferred
        failed_at = None if chain is None else self._failures.chains.get(chain.names)
        failed_now = failed_at is not None and self._dependencies.clock() < failed_at + self._pause_length
        return None if failed_now and not allow_failed else chain

    @property
    def _pause_length(self) -> float:
        return self._dependencies.policy.first_pause_seconds * 2.0**self._failures.count

    async def _pause(self, generated_tokens: int) -> None:
        """Waits until the shards' state changes, at most for the pause. Raises where the wait is used up."""
        registry, policy = self._dependencies.registry, self._dependencies.policy
        version = registry.version
        replicas = {one for route in self.routes for stage in registry.stages[route] for one in stage}
        await registry.refresh(replicas, policy.refresh_seconds)
        if registry.version != version:
            return
        left = self._left_seconds()
        if left <= 0:
            raise self._final_error(generated_tokens)
        await registry.changed_since(version, min(self._pause_length, left))

    def _left_seconds(self) -> float:
        """What is left of the wait; 0 for an answer that no chain has started."""
        if self._failures.since is None:
            return 0.0
        return self._failures.since + self._dependencies.policy.wait_seconds - self._dependencies.clock()

    def _final_error(self, generated_tokens: int) -> StitchError:
        error = self._failures.last_error
        if isinstance(error, Exhausted):
            return error
        if isinstance(error, ChainLost) and error.final is not None:
            return error.final
        reason = f": {error}" if error else ""
        message = f"no chain of route {' or '.join(self.routes)} can continue after {generated_tokens:,} tokens{reason}"
        return Unavailable(message, generated_tokens)
