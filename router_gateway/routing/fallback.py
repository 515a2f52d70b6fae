"""Keeps a router's failure from failing a request. Knows no way to judge of its own."""

from __future__ import annotations

import logging
import math

from router_gateway.routing.router import Deferred, Judgement, Query, Router

_log = logging.getLogger(__name__)


class FallbackRouter:
    """Asks `router`; where that raises or has no proper answer, takes `fallback_route` (None: the dearest)."""

    def __init__(self, router: Router, fallback_route: str | None = None) -> None:
        self._router = router
        self._fallback_route = fallback_route

    def judge(self, query: Query) -> Judgement | Deferred:
        try:
            judgement = self._router.judge(query)
        # A router is a plug-in: whatever goes wrong in it, the query has a route all the same.
        except Exception:
            _log.exception("the router failed")
            return self._fallback(query, "the router failed")
        if isinstance(judgement, Deferred):
            return judgement
        if not _is_proper(judgement, query):
            _log.error("the router answered %s", judgement)
            return self._fallback(query, "the router's answer is no judgement")
        return judgement

    def _fallback(self, query: Query, why: str) -> Judgement:
        route = self._fallback_route or query.routes[-1]
        return Judgement(route, 1.0, f"{why}, so the fallback", "fallback")


def _is_proper(judgement: Judgement, query: Query) -> bool:
    complete = judgement.qualities is None or len(judgement.qualities) == len(query.routes)
    finite = judgement.score is not None and math.isfinite(judgement.score)
    return judgement.route in query.routes and finite and complete
