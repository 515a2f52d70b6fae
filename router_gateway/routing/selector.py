"""The route that a request takes: what it names, what its conversation keeps, what the router takes, and of those what
its objectives allow. Knows no way to judge a text and no shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from router_gateway.requests.types import Prompt, Request
from router_gateway.routing.conversations import Conversations
from router_gateway.routing.drift_monitor import DriftMonitor
from router_gateway.routing.objectives import Forecast, Objectives, narrowed, settled
from router_gateway.routing.router import DeferredDecision, Query, ReasonKind, RouteDecision, Router
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.shards.models import ModelRegistry
from stitch.errors import InvalidRequest


class Selection:
    """Asks the router for every request, so that its score is known even where its choice is not taken."""

    def __init__(
        self,
        router: Router,
        catalogue: ModelRegistry,
        pace: TtftPredictor,
        conversations: Conversations,
        watch: DriftMonitor,
    ) -> None:
        self._router = router
        self._catalogue = catalogue
        self._pace = pace
        self._conversations = conversations
        self._watch = watch

    def select(
        self, request: Request, prompt_tokens: int, waited_seconds: float = 0.0
    ) -> RouteDecision | DeferredDecision:
        """The route and why, or between which routes the first shard is to judge; nothing is kept of the request.

        It came `waited_seconds` ago.

        Raises ObjectivesUnmet, or InvalidRequest for an objective that the router has no prediction for.
        """
        query = Query(user_turns(request.prompt), tuple(self._catalogue.routes()))
        judged = self._router.decide(query)
        preferred = self._preferred(request, judged)
        objectives = _applicable(request.objectives, judged)
        if not objectives.given:
            return preferred
        open_to = query.routes if request.route is None else (request.route,)
        qualities = judged.qualities if isinstance(judged, RouteDecision) else None
        forecasts = self._forecasts(qualities, query.routes, prompt_tokens, waited_seconds)
        possible = [one for one in forecasts if one.route in open_to]
        if isinstance(preferred, DeferredDecision):
            return narrowed(objectives, possible)
        return settled(objectives, preferred, possible)

    def take(self, request: Request, decision: RouteDecision) -> None:
        """The request is answered on that route: its conversation stays there, if it wasn't on one already.

        A route that the request names is one to stay on; a fallback is not, nor one that an objective made it take.
        """
        self._watch.judged(decision, self._catalogue.routes())
        name = request.conversation_id
        if not name:
            return
        known = self._conversations.route_of(name)
        if request.route is None and known is not None:
            self._conversations.keep(name, known)
        elif decision.kind not in ("fallback", "objective"):
            self._conversations.keep(name, decision.route)

    def _preferred(
        self, request: Request, judged: RouteDecision | DeferredDecision
    ) -> RouteDecision | DeferredDecision:
        if request.route is not None:
            return _instead(judged, request.route, "the request names it", "requested")
        kept = self._conversations.route_of(request.conversation_id) if request.conversation_id else None
        if kept is not None:
            return _instead(judged, kept, f"the conversation keeps {kept}", "conversation")
        return judged

    def _forecasts(
        self,
        qualities: tuple[float, ...] | None,
        routes: tuple[str, ...],
        prompt_tokens: int,
        waited_seconds: float,
    ) -> Iterator[Forecast]:
        costs = self._catalogue.costs()
        for index, route in enumerate(routes):
            seconds = self._pace.seconds(route, prompt_tokens)
            yield Forecast(
                route,
                ttft_seconds=None if seconds is None else waited_seconds + seconds,
                cost=costs.get(route),
                quality=None if qualities is None else qualities[index],
            )


def user_turns(prompt: Prompt) -> tuple[str, ...]:
    """What the user said, oldest first."""
    if isinstance(prompt, str):
        return (prompt,)
    return tuple(turn.content for turn in prompt if turn.role == "user")


def _instead(judged: RouteDecision | DeferredDecision, route: str, why: str, kind: ReasonKind) -> RouteDecision:
    """`route`, whatever the router says; its score and choice are told where it judges here."""
    if isinstance(judged, DeferredDecision):
        return RouteDecision(route, None, why, kind)
    reason = f"{why}; the router would take {judged.route} ({judged.reason})"
    return replace(judged, route=route, reason=reason, kind=kind)


def _applicable(objectives: Objectives, judged: RouteDecision | DeferredDecision) -> Objectives:
    """Those that can be held against a prediction; a router that failed is no reason to refuse a request."""
    if objectives.min_quality is None:
        return objectives
    if isinstance(judged, RouteDecision):
        if judged.qualities is not None:
            return objectives
        if judged.kind == "fallback":
            return replace(objectives, min_quality=None)
    limit = "only a learned router of texts predicts quality, and this gateway has none"
    raise InvalidRequest("objectives.min_quality", objectives.min_quality, limit)
