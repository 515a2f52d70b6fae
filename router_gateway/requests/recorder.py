"""What one request leaves behind in metrics and log. Knows no text.

`with Observation(...)` spans the request; however the block is left, its outcome is counted once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from router_gateway.metrics import NO_ROUTE, STAGES, Metrics, prompt_bucket
from router_gateway.requests.preparation import Prepared
from router_gateway.requests.types import FinishReason, Stage
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.ttft_predictor import Run, TtftPredictor
from stitch.errors import Exhausted, Expired, InvalidRequest, ObjectivesUnmet, Unavailable

_log = logging.getLogger(__name__)

# A client's own clock ends its call, and its word may come before the deadline that was read here: gRPC sends a
# timeout rounded up, by at most this share of it, and the way takes time.
_ROUNDING = 0.01
_WAY_SECONDS = 0.05

_OUTCOMES: dict[type[BaseException], str] = {
    InvalidRequest: "invalid",
    Exhausted: "exhausted",
    Unavailable: "unavailable",
    Expired: "expired",
    ObjectivesUnmet: "unmet",
    asyncio.CancelledError: "cancelled",
    # The reader of the answer went away.
    GeneratorExit: "cancelled",
}


class Recorder:
    """Times are seconds of `clock`; `arrival` and `deadline` are moments of it."""

    def __init__(
        self,
        arrival: float,
        deadline: float | None,
        pace: TtftPredictor,
        metrics: Metrics,
        clock: Callable[[], float],
        stopping: Callable[[], bool],
    ) -> None:
        self._request_id = "without a name"
        self._arrival = arrival
        self._deadline = deadline
        self._pace = pace
        self._metrics = metrics
        self._clock = clock
        self._stopping = stopping
        self._route = NO_ROUTE
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._last_token: float | None = None
        self._place = metrics.requests_waiting
        self._finish: FinishReason | None = None
        self._run: Run | None = None
        self._max_ttft_seconds: float | None = None
        self.ttft_seconds: float | None = None
        self.stages: tuple[Stage, ...] = ()

    def __enter__(self) -> Self:
        self._place.inc()
        return self

    def named(self, request_id: str) -> None:
        """Its name in the log."""
        self._request_id = request_id

    def prepared(self, prepared: Prepared) -> None:
        """Its prompt is known and stands in line."""
        self._prompt_tokens = len(prepared.token_ids)
        self._run = self._pace.begin(self._prompt_tokens)
        self._max_ttft_seconds = prepared.request.objectives.max_ttft_seconds

    def judged(self, decision: RouteDecision) -> None:
        """It has a route."""
        self._route = decision.route
        self._metrics.prompt_tokens.labels(route=self._route).observe(self._prompt_tokens)
        self._metrics.routed.labels(route=self._route, reason=decision.kind).inc()
        if decision.score is not None:
            self._metrics.route_score.observe(decision.score)
        if self._run is not None:
            self._run.takes(decision.route)

    def handed_over(self) -> None:
        """From here on the shards work on it."""
        self._add_stages([Stage("route", self.elapsed_seconds())])
        self._place.dec()
        self._place = self._metrics.requests_running
        self._place.inc()

    def tokens(self, count: int, stages: Iterable[Stage]) -> None:
        """So many came at once."""
        if not count:
            return
        self._prompt_is_computed()
        self._add_stages(stages)
        now = self._clock()
        if self._last_token is not None:
            latency = self._metrics.inter_token_latency.labels(route=self._route)
            for _ in range(count):
                latency.observe((now - self._last_token) / count)
        self._last_token = now
        self._generated_tokens += count
        self._metrics.generated_tokens.labels(route=self._route).inc(count)

    def text(self) -> None:
        """A piece of text leaves for the client."""
        if self.ttft_seconds is not None:
            return
        self.ttft_seconds = self.elapsed_seconds()
        self._metrics.time_to_first_token.labels(route=self._route).observe(self.ttft_seconds)
        if self._run is not None:
            self._run.text()
        if self._max_ttft_seconds is not None:
            outcome = "met" if self.ttft_seconds <= self._max_ttft_seconds else "missed"
            self._metrics.ttft_objectives.labels(route=self._route, outcome=outcome).inc()
        by_prompt = self._metrics.time_to_first_token_by_prompt
        by_prompt.labels(route=self._route, prompt_bucket=prompt_bucket(self._prompt_tokens)).observe(self.ttft_seconds)

    def finished(self, reason: FinishReason) -> None:
        self._finish = reason

    def elapsed_seconds(self) -> float:
        return self._clock() - self._arrival

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._place.dec()
        self._prompt_is_computed()
        outcome = self._outcome(kind)
        self._metrics.request_duration.labels(route=self._route, outcome=outcome).observe(self.elapsed_seconds())
        if outcome in ("cancelled", "expired"):
            self._metrics.cancelled.labels(cause=self._cancel_cause(outcome)).inc()
        _log.info(
            "request %s: %s, route %s, %d prompt tokens, %d generated, %.3f s",
            *(self._request_id, outcome, self._route, self._prompt_tokens, self._generated_tokens),
            self.elapsed_seconds(),
        )

    def _prompt_is_computed(self) -> None:
        """Or never will be."""
        if self._run is not None:
            self._run.token()

    def _add_stages(self, stages: Iterable[Stage]) -> None:
        self.stages = (*self.stages, *stages)
        for stage in stages:
            if stage.name in STAGES:
                self._metrics.ttft_stage.labels(stage=stage.name).observe(stage.seconds)

    def _outcome(self, kind: type[BaseException] | None) -> str:
        # The reader may leave between the last piece and the block's end.
        if self._finish is not None:
            return self._finish.value
        return "failed" if kind is None else _OUTCOMES.get(kind, "failed")

    def _cancel_cause(self, outcome: str) -> str:
        expired = self._deadline is not None and self._is_at(self._deadline)
        if expired or outcome == "expired":
            return "deadline"
        return "shutdown" if self._stopping() else "client"

    def _is_at(self, deadline: float) -> bool:
        return self._clock() >= deadline - _WAY_SECONDS - _ROUNDING * (deadline - self._arrival)
