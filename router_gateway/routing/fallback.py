"""Keeps a router's failure from failing a request. Knows no way to judge of its own."""

from __future__ import annotations

import logging
import math

from router_gateway.routing.router import DeferredDecision, Query, RouteDecision, Router

_log = logging.getLogger(__name__)


class FallbackRouter:
    """Asks `router`; where that raises or has no proper answer, takes `fallback_route` (None: the dearest)."""

    def __init__(self, router: Router, fallback_route: str | None = None) -> None:
        self._router = router
        self._fallback_route = fallback_route

    def judge(self, query: Query) -> RouteDecision | DeferredDecision:
        try:
            decision = self._router.judge(query)
        # A router is a plug-in: whatever goes wrong in it, the query has a route all the same.
        except Exception:
            _log.exception("the router failed")
            return self._fallback(query, "the router failed")
        if isinstance(decision, DeferredDecision):
            return decision
        if not _is_proper(decision, query):
            _log.error("the router answered %s", decision)
            return self._fallback(query, "the router's answer is no judgement")
        return decision

    def _fallback(self, query: Query, why: str) -> RouteDecision:
        route = self._fallback_route or query.routes[-1]
        return RouteDecision(route, 1.0, f"{why}, so the fallback", "fallback")


def _is_proper(decision: RouteDecision, query: Query) -> bool:
    complete = decision.qualities is None or len(decision.qualities) == len(query.routes)
    finite = decision.score is not None and math.isfinite(decision.score)
    return decision.route in query.routes and finite and complete
