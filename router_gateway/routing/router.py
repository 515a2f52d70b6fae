"""The interface of a router, its decisions, and two pieces that routers share: thresholds and a fallback.

In goes a `Query`, out comes a `RouteDecision`, or a `DeferredDecision` where the first shard decides while it computes
the prompt. A router is called on the event loop, so it takes well under a millisecond.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

_log = logging.getLogger(__name__)

# Why a query takes its route; also a metric's label.
ReasonKind = Literal["requested", "length", "content", "gain", "probe", "fallback", "objective", "conversation", "load"]
# Of a request that is about to be refused; thresholds are ten times as high then.
MAX_PRESSURE = 0.9
REASON_KINDS: tuple[ReasonKind, ...] = get_args(ReasonKind)


@dataclass(frozen=True, slots=True)
class Query:
    """What a router decides on: the user's text, and the routes to choose from."""

    # All turns of the user, oldest first, since a follow-up such as "commit it" says little alone.
    turns: tuple[str, ...]
    # Cheapest first, at least one.
    routes: tuple[str, ...]
    # How much of the time for which a request may wait for shards it will wait: 0 to MAX_PRESSURE.
    pressure: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteDecision:
    route: str
    # How much the query needs the strongest route, 0 to 1; None where no router scored it.
    score: float | None
    # For people to read.
    reason: str
    kind: ReasonKind
    # Expected quality of the answer on every route of the query; None where the router predicts none.
    qualities: tuple[float, ...] | None = None

    def to_proto(self) -> inference_pb2.RouteDecision:
        return inference_pb2.RouteDecision(route=self.route, score=self.score or 0.0, reason=self.reason)


def _unchanged(decision: RouteDecision) -> RouteDecision:
    return decision


@dataclass(frozen=True, slots=True)
class DeferredDecision:
    """No decision yet: the first shard chooses one of these routes while it computes the prompt."""

    # Cheapest first.
    routes: tuple[str, ...]
    # Applies the request's objectives to the shard's decision.
    finalize: Callable[[RouteDecision], RouteDecision] = _unchanged


class Router(Protocol):
    """Chooses a route for a query."""

    def decide(self, query: Query) -> RouteDecision | DeferredDecision:
        """The route for a query; every text has one. May raise: `FallbackRouter` then takes the fallback route."""
        ...


class FallbackRouter:
    """Asks `router`; where that raises or decides nothing valid, takes `fallback_route`.

    None: the most expensive route of the query.
    """

    def __init__(self, router: Router, fallback_route: str | None = None) -> None:
        self._router = router
        self._fallback_route = fallback_route

    def decide(self, query: Query) -> RouteDecision | DeferredDecision:
        try:
            decision = self._router.decide(query)
        # A router may be any code: whatever it raises, the query still gets a route.
        except Exception:
            _log.exception("the router failed")
            return self._fallback(query, "the router failed")
        if isinstance(decision, DeferredDecision):
            return decision
        if not _is_valid(decision, query):
            _log.error("the router's decision is invalid: %s", decision)
            return self._fallback(query, "the router's decision is invalid")
        return decision

    def _fallback(self, query: Query, why: str) -> RouteDecision:
        route = self._fallback_route or query.routes[-1]
        return RouteDecision(route, 1.0, f"{why}, so the fallback", "fallback")


def _is_valid(decision: RouteDecision, query: Query) -> bool:
    complete = decision.qualities is None or len(decision.qualities) == len(query.routes)
    finite = decision.score is not None and math.isfinite(decision.score)
    return decision.route in query.routes and finite and complete


class Ladder:
    """Maps a score in [0, 1] to one of N routes, cheapest first, by one threshold between adjacent routes."""

    def __init__(self, thresholds: Sequence[float] | None = None) -> None:
        """None: thresholds that give every route an equal share of the range of scores."""
        self._thresholds = thresholds

    def pick(self, score: float, routes: Sequence[str], pressure: float = 0.0) -> tuple[str, str]:
        """The route for a score, and the comparison that decided, in words."""
        thresholds = raised(self._thresholds or equal_steps(len(routes)), pressure)
        index = bisect_right(thresholds, score)
        if index == 0:
            compared = f"below {thresholds[0]:.2f}" if thresholds else "the only route"
        else:
            compared = f"at least {thresholds[index - 1]:.2f}"
        return routes[index], f"{score:.2f}, {compared}"


def raised(thresholds: Sequence[float], pressure: float) -> Sequence[float]:
    """The thresholds while requests wait: higher, so that more texts take a cheaper route."""
    rest = 1.0 - min(pressure, MAX_PRESSURE)
    return [one / rest if one > 0 else one * rest for one in thresholds]


def equal_steps(routes: int) -> list[float]:
    """Thresholds that give every route an equal share of the range of scores."""
    return [step / routes for step in range(1, routes)]


def check_thresholds(thresholds: Sequence[float] | None, routes: int) -> None:
    """Raises InvalidRequest unless there is one between every two routes, ascending within (0, 1)."""
    if thresholds is None:
        return
    if len(thresholds) != routes - 1:
        raise InvalidRequest("gateway.thresholds", list(thresholds), f"{routes} routes need {routes - 1} of them")
    if not all(low < high for low, high in pairwise((0.0, *thresholds, 1.0))):
        raise InvalidRequest("gateway.thresholds", list(thresholds), "they must rise, above 0 and below 1")
