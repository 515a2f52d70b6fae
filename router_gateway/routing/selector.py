"""Selects the route of a request: the one that it names, else its conversation's, else the router's decision; of
these, what its objectives allow.

The router decides on every request, so that its score is known also where another rule overrides its route. Of a
request that is refused, nothing is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cachetools import TTLCache

from router_gateway.routing.drift import DriftMonitor
from router_gateway.routing.objectives import NO_OBJECTIVES, Forecast, Objectives, apply_objectives, restrict
from router_gateway.routing.router import DeferredDecision, Ladder, Query, ReasonKind, RouteDecision, Router
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.shards.models import ModelRegistry
from stitch.errors import InvalidRequest

MAX_CONVERSATIONS = 10_000
# After the last request of a conversation.
CONVERSATION_SECONDS = 3600.0
# Of the latest requests with an objective for their TTFT, the share whose objectives count as tight.
LATEST_OBJECTIVES, TIGHT_SHARE = 64, 0.1


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """What a request asks of its route."""

    # None: the router decides.
    route: str | None = None
    objectives: Objectives = NO_OBJECTIVES
    # Empty: the request belongs to no conversation.
    conversation_id: str = ""
    # Whose requests make way for each other's objectives under load.
    tenant: str = ""
    # In place of the router's: the score from which on the most expensive route answers; None: the router's.
    threshold: float | None = None


NO_OPTIONS = RoutingOptions()


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a request waits until shards compute it."""

    # From its arrival on.
    seconds: float = 0.0
    # What of the time for which it may wait for shards it will wait: 0 to 1.
    pressure: float = 0.0


NO_WAIT = Wait()


def conversation_routes(clock: Callable[[], float]) -> TTLCache[str, str]:
    """An empty map from conversation ids to routes; an entry expires, and the least recently used one makes room."""
    return TTLCache(MAX_CONVERSATIONS, CONVERSATION_SECONDS, timer=clock)


class Selector:
    """Combines the router with requests, conversations and objectives. `conversations` maps their ids to routes.

    With `cheaper_under_load` thresholds rise for requests with an objective while earlier prompts are pending.
    """

    def __init__(
        self,
        router: Router,
        models: ModelRegistry,
        predictor: TtftPredictor,
        conversations: MutableMapping[str, str],
        monitor: DriftMonitor,
        cheaper_under_load: bool = True,
    ) -> None:
        self._router = router
        self._models = models
        self._predictor = predictor
        self._conversations = conversations
        self._monitor = monitor
        self._cheaper_under_load = cheaper_under_load
        # Seconds, by tenant; without those that the cheapest route could not meet if it were idle.
        self._latest_objectives: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=LATEST_OBJECTIVES))

    def select(
        self, options: RoutingOptions, turns: Sequence[str], prompt_tokens: int, wait: Wait = NO_WAIT
    ) -> RouteDecision | DeferredDecision:
        """The route for a user's turns, oldest first.

        Raises ObjectivesUnmet, or InvalidRequest for an objective that the router has no prediction for.
        """
        query = Query(tuple(turns), tuple(self._models.routes()))
        routed = self._router.decide(query)
        if options.threshold is None:
            routed = self._under_load(routed, query, self._pressure(routed, query, options, prompt_tokens, wait))
        else:
            routed = _by_threshold(routed, options.threshold, query.routes)
        preferred = self._preferred(options, routed)
        objectives = _applicable(options.objectives, routed)
        if not objectives.given:
            return preferred
        allowed = query.routes if options.route is None else (options.route,)
        qualities = routed.qualities if isinstance(routed, RouteDecision) else None
        most = math.inf if objectives.max_ttft_seconds is None else objectives.max_ttft_seconds
        forecasts = self._forecasts(qualities, query.routes, prompt_tokens, wait.seconds, most)
        possible = [forecast for forecast in forecasts if forecast.route in allowed]
        if isinstance(preferred, DeferredDecision):
            return restrict(objectives, possible)
        return apply_objectives(objectives, preferred, possible)

    def record(self, options: RoutingOptions, decision: RouteDecision) -> None:
        """The request is answered on the route of the decision: keeps it for its conversation, and counts it.

        A conversation stays on its route unless the request names another one; a fallback, or a route that an
        objective or the load enforced, is none to stay on.
        """
        self._monitor.observe(decision, self._models.routes())
        name = options.conversation_id
        if not name:
            return
        kept = self._conversations.get(name)
        if options.route is None and kept is not None:
            self._conversations[name] = kept
        elif decision.kind not in ("fallback", "objective", "load"):
            self._conversations[name] = decision.route

    def _pressure(
        self,
        routed: RouteDecision | DeferredDecision,
        query: Query,
        options: RoutingOptions,
        prompt_tokens: int,
        wait: Wait,
    ) -> float:
        """What of the time for which the request may wait it will wait: 0 to 1.

        With an objective for its TTFT, what earlier prompts take of the tight ones among its tenant's latest requests'
        if that is more: shards have room for many prompts that miss them, and a request with time makes way for one
        without.
        """
        most = options.objectives.max_ttft_seconds
        if most is None or not self._cheaper_under_load or isinstance(routed, DeferredDecision):
            return wait.pressure
        least = self._predictor.alone_seconds(query.routes[0], prompt_tokens)
        latest = self._latest_objectives[options.tenant]
        if least is None or least <= most:
            latest.append(most)
        predicted = self._predictor.predict_seconds(routed.route, prompt_tokens)
        alone = self._predictor.alone_seconds(routed.route, prompt_tokens)
        waited = wait.seconds if wait.pressure else 0.0
        if predicted is not None and alone is not None:
            waited += predicted - alone
        return max(wait.pressure, min(1.0, waited / min(most, _tight_objective(latest, most))))

    def _under_load(
        self, routed: RouteDecision | DeferredDecision, query: Query, pressure: float
    ) -> RouteDecision | DeferredDecision:
        """The router's decision with thresholds that rise while requests wait; a probe's don't, nor does a fallback."""
        if not pressure or isinstance(routed, DeferredDecision) or routed.kind == "fallback":
            return routed
        decided = self._router.decide(replace(query, pressure=pressure))
        if isinstance(decided, DeferredDecision) or decided.kind == "fallback" or decided.route == routed.route:
            return routed
        why = f"since requests wait for shards; otherwise it would be {routed.route} ({routed.reason})"
        return replace(decided, reason=f"{decided.reason}, {why}", kind="load")

    def _preferred(
        self, options: RoutingOptions, routed: RouteDecision | DeferredDecision
    ) -> RouteDecision | DeferredDecision:
        if options.route is not None:
            return _override(routed, options.route, "the request names it", "requested")
        kept = self._conversations.get(options.conversation_id) if options.conversation_id else None
        if kept is not None:
            return _override(routed, kept, f"the conversation keeps {kept}", "conversation")
        return routed

    def _forecasts(
        self,
        qualities: tuple[float, ...] | None,
        routes: tuple[str, ...],
        prompt_tokens: int,
        waited_seconds: float,
        most_seconds: float,
    ) -> Iterator[Forecast]:
        costs = self._models.costs()
        for index, route in enumerate(routes):
            seconds = self._predictor.predict_within(route, prompt_tokens, most_seconds - waited_seconds)
            yield Forecast(
                route,
                ttft_seconds=None if seconds is None else waited_seconds + seconds,
                cost=costs.get(route),
                quality=None if qualities is None else qualities[index],
            )


def _tight_objective(latest: Collection[float], default: float) -> float:
    """Seconds that TIGHT_SHARE of the latest objectives don't exceed."""
    return sorted(latest)[int(TIGHT_SHARE * (len(latest) - 1))] if latest else default


def _by_threshold(
    routed: RouteDecision | DeferredDecision, threshold: float, routes: Sequence[str]
) -> RouteDecision | DeferredDecision:
    """The router's score on a ladder of equal steps, the last of which is at `threshold`; a fallback is kept.

    Raises InvalidRequest where a probe decides, whose score comes with its decision.
    """
    if isinstance(routed, DeferredDecision):
        limit = "the probe of the first shard decides here, by its own thresholds"
        raise InvalidRequest("threshold", threshold, limit)
    if routed.score is None or routed.kind == "fallback":
        return routed
    steps = [threshold * step / (len(routes) - 1) for step in range(1, len(routes))]
    route, compared = Ladder(steps).pick(routed.score, routes)
    why = f"by the request's threshold; the router would take {routed.route} ({routed.reason})"
    return replace(routed, route=route, reason=f"{compared}, {why}")


def _override(routed: RouteDecision | DeferredDecision, route: str, why: str, kind: ReasonKind) -> RouteDecision:
    """A decision for `route`, with the router's score and choice where it made one."""
    if isinstance(routed, DeferredDecision):
        return RouteDecision(route, None, why, kind)
    reason = f"{why}; the router would take {routed.route} ({routed.reason})"
    return replace(routed, route=route, reason=reason, kind=kind)


def _applicable(objectives: Objectives, routed: RouteDecision | DeferredDecision) -> Objectives:
    """The objectives that can be compared with a prediction; after a router's failure, all but the quality."""
    if objectives.min_quality is None:
        return objectives
    if isinstance(routed, RouteDecision):
        if routed.qualities is not None:
            return objectives
        if routed.kind == "fallback":
            return replace(objectives, min_quality=None)
    limit = "only a learned router of texts predicts quality, and this gateway has none"
    raise InvalidRequest("objectives.min_quality", objectives.min_quality, limit)
