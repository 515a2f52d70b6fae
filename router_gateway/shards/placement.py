"""Chooses the chain of replicas for a request, and keeps the sessions that this gateway has placed.

For every stage of the route, of the replicas that accept requests: one that is not avoided, did not fail this request,
has room for its KV, has computed most of its prompt already, and has the fewest sessions for its size; where these are
equal the one with the most free KV. What a replica has computed counts only while it has hardly more sessions than
others. Each of these is a preference, so a stage is never without a replica that accepts requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from router_gateway.shards.compatibility import Facts
from router_gateway.shards.prefixes import Names, Prefixes
from router_gateway.shards.registry import ShardRegistry
from router_gateway.shards.replica import Replica

Preference = tuple[bool, int, bool, int, float, int]


class Prompt(NamedTuple):
    """The tokens of a prompt, and the tenant whose sessions share their KV."""

    tenant: str
    token_ids: Sequence[int]


NO_PROMPT = Prompt("", ())


@dataclass(frozen=True, slots=True)
class Chain:
    """One replica for every stage of a route, first to last."""

    replicas: tuple[Replica, ...]

    @property
    def first(self) -> Replica:
        return self.replicas[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(replica.config.name for replica in self.replicas)

    @property
    def next_names(self) -> tuple[str, ...]:
        """Names of the shards after the first."""
        return self.names[1:]

    @property
    def draining(self) -> bool:
        """Whether one of its shards refuses new sessions."""
        return any(replica.draining for replica in self.replicas)


@dataclass(frozen=True, slots=True)
class CandidateChains(Chain):
    """The chains of several routes, between which their common first shard decides; `replicas` are those of all."""

    by_route: Mapping[str, Chain]


@dataclass(eq=False, slots=True, kw_only=True)
class PlacedSession:
    """One session on a chain. Its block is from its placement to its end: it reserves KV on every shard within."""

    chain: Chain
    # What its shards have in common: with other facts it has other tokens.
    facts: Facts
    # Tokens that its first shard gets.
    length: int
    # KV tokens that it may need: prompt and longest answer.
    reserved_tokens: int
    clock: Callable[[], float]
    # When it was placed, later when its latest message came.
    last_at: float
    # The sessions within their block.
    running: set[PlacedSession] = field(repr=False)
    # Tokens that came.
    tokens: int = 0
    # Tokens that had come at the latest check of its progress, and when the last of them came.
    sampled: tuple[int, float] = (0, 0.0)
    # Ends its stream; None while it has none.
    cancel: Callable[[], object] | None = None
    # The shard for whose silence its stream was ended.
    silent_shard: str = ""

    @property
    def held_tokens(self) -> int:
        """KV tokens that it holds on each shard; before its first token it may still wait for them."""
        return self.length + self.tokens if self.tokens else 0

    def __enter__(self) -> Self:
        self.running.add(self)
        for replica in self.chain.replicas:
            replica.load.add(self)
            replica.ejection.placed(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.running.discard(self)
        self._leave(self.chain.replicas)
        # One that its client ended is a success, too.
        if self.tokens and (kind is None or not issubclass(kind, Exception)):
            for replica in self.chain.replicas:
                replica.ejection.succeeded()

    def record(self, tokens: int) -> None:
        """A message came with this many tokens."""
        self.last_at = self.clock()
        if tokens and not self.tokens:
            for replica in self.chain.replicas:
                replica.ejection.progressed(self)
        self.tokens += tokens

    def take_route(self, route: str) -> None:
        """The first shard has chosen: frees what is reserved on the shards of other routes."""
        if isinstance(self.chain, CandidateChains):
            chosen = self.chain.by_route[route]
            self._leave(one for one in self.chain.replicas if one not in chosen.replicas)
            self.chain = chosen

    def lost(self, shard: str, reason: str, at_once: bool) -> None:
        """Its chain failed: avoids `shard` for a time; where that is empty, any of its shards may be the reason.

        Such a failure counts, or with `at_once` is enough to avoid all of them.
        """
        for replica in self.chain.replicas:
            if replica.config.name == shard:
                replica.ejection.eject("unreachable", reason)
            elif not shard and at_once:
                replica.ejection.eject("failures", reason)
            elif not shard:
                replica.ejection.failed(reason)

    def end_for_silence(self, replica: Replica) -> None:
        """Ends its stream, since `replica` is silent while the stream waits for a token."""
        if self.cancel is not None and not self.silent_shard:
            self.silent_shard = replica.config.name
            self.cancel()

    def _leave(self, replicas: Iterable[Replica]) -> None:
        for replica in replicas:
            replica.load.remove(self)
            replica.ejection.left(self)


class Placement:
    """Chooses among the replicas of a registry, and has all sessions that are placed now."""

    def __init__(self, registry: ShardRegistry) -> None:
        self._registry = registry
        self.clock = registry.clock
        self.prefixes = Prefixes()
        self.sessions: set[PlacedSession] = set()

    @property
    def replicas(self) -> list[Replica]:
        """All that may have sessions."""
        return self._registry.all_replicas

    def choose(
        self,
        route: str,
        failures: Counter[str],
        tokens: int = 0,
        facts: Facts | None = None,
        prompt: Prompt = NO_PROMPT,
    ) -> Chain | None:
        """The chain for a session of `route` that may need `tokens` of KV.

        `failures` has the request's failures by shard. None where a stage has no replica that accepts requests, or
        where the shards now compute something else than `facts`, with which the answer began.
        """
        if facts is not None and not self._registry.compatibility.continues(facts, (route,)):
            return None
        computed = self._computed(route, prompt)
        chosen: list[Replica] = []
        for stage in self._registry.stages[route]:
            candidates = [replica for replica in stage if replica.accepts_requests]
            if not candidates:
                return None
            names = tuple(replica.config.name for replica in chosen)
            least = min((one.load.share for one in candidates if not one.avoided), default=0.0)

            def preference(replica: Replica, names: Names = names, least: float = least) -> Preference:
                held = computed.get((*names, replica.config.name), 0) if replica.load.is_about(least) else 0
                return _preference(replica, failures, tokens, held)

            chosen.append(min(candidates, key=preference))
        return Chain(tuple(chosen))

    def _computed(self, route: str, prompt: Prompt) -> Counter[Names]:
        """How many tokens of the prompt each chain, and each beginning of one, has computed.

        Bottom shards share what they have computed between routes, so there the tokens of all routes count, and those
        of this route a second time: of these all layers are computed.
        """
        found = Counter(self.prefixes.computed(prompt.tenant, route, prompt.token_ids))
        bottoms = {
            one.config.name for stage in self._registry.stages[route] for one in stage if one.config.role == "bottom"
        }
        shared = Counter[Names]()
        for other in self._registry.stages if bottoms and prompt.token_ids else ():
            for names, tokens in self.prefixes.computed(prompt.tenant, other, prompt.token_ids).items():
                if bottoms.issuperset(names):
                    shared[names] = max(shared[names], tokens)
        return found + shared

    def choose_candidates(
        self,
        routes: Sequence[str],
        failures: Counter[str],
        tokens: int = 0,
        facts: Facts | None = None,
        prompt: Prompt = NO_PROMPT,
    ) -> CandidateChains | None:
        """A chain as `choose` finds it for each route; None where one of them has none.

        All have the same first shard, since all routes have the same first stage.
        """
        chains = {route: self.choose(route, failures, tokens, facts, prompt) for route in routes}
        found = {route: chain for route, chain in chains.items() if chain is not None}
        if len(found) < len(chains):
            return None
        replicas = {replica.config.name: replica for chain in found.values() for replica in chain.replicas}
        return CandidateChains(tuple(replicas.values()), found)

    def place(self, chain: Chain, length: int, reserved_tokens: int) -> PlacedSession:
        """A session of `length` tokens for the chain, which may need `reserved_tokens` of KV on every shard."""
        return PlacedSession(
            chain=chain,
            facts=self._registry.compatibility.facts,
            length=length,
            reserved_tokens=reserved_tokens,
            clock=self.clock,
            last_at=self.clock(),
            running=self.sessions,
        )

    def peers(self, replica: Replica) -> list[Replica]:
        """The other replicas of its stage."""
        return [one for one in self.replicas if one is not replica and one.config.stage == replica.config.stage]

    def reachable(self, route: str) -> bool:
        """Whether every stage of the route has a replica that accepts requests."""
        return all(any(replica.accepts_requests for replica in stage) for stage in self._registry.stages[route])


def _preference(replica: Replica, failures: Counter[str], tokens: int, computed_tokens: int) -> Preference:
    """The smallest is chosen, the first of equals."""
    load = replica.load
    return (
        replica.avoided,
        failures[replica.config.name],
        load.free_tokens < tokens,
        -computed_tokens,
        load.share,
        -load.free_tokens,
    )
