"""What a router is asked and what it answers. Knows no way to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

# Why a query took its route, in a word that is fit for a metric's label.
ReasonKind = Literal["requested", "length", "content", "gain", "probe", "fallback", "objective", "conversation"]
REASON_KINDS: tuple[ReasonKind, ...] = get_args(ReasonKind)


@dataclass(frozen=True, slots=True)
class Query:
    """What is judged: all that the user said, and the routes to choose from."""

    # Every turn of the user's, oldest first: a follow-up such as "commit it" says little alone.
    turns: tuple[str, ...]
    # Cheapest first, at least one.
    routes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RouteDecision:
    route: str
    # How much the query asks for the strongest route, 0 to 1; None where the request names the route and nobody judged.
    score: float | None
    # For a person to read.
    reason: str
    kind: ReasonKind
    # What the answer is expected to be worth on every route of the query, where the router has learned it.
    qualities: tuple[float, ...] | None = None


def _as_it_is(decision: RouteDecision) -> RouteDecision:
    return decision


@dataclass(frozen=True, slots=True)
class DeferredDecision:
    """No judgement yet: the first shard takes one of these routes while it computes the prompt."""

    # Cheapest first.
    routes: tuple[str, ...]
    # What the request's objectives make of the first shard's judgement.
    settled: Callable[[RouteDecision], RouteDecision] = _as_it_is


class Router(Protocol):
    """Anything that picks a route. It is called on the event loop, so it takes well under a millisecond."""

    def judge(self, query: Query) -> RouteDecision | DeferredDecision:
        """The route for a query; any text has one. An exception makes the gateway take its fallback."""
        ...
