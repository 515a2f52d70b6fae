"""Records one request in metrics, trace and log: its events in, counters, histograms, spans and one log line out.

`with Recorder(...)` spans the request. However the block is left, exactly one outcome is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from router_gateway.metrics import NO_ROUTE, STAGES, Metrics, prompt_bucket
from router_gateway.requests.request_log import Write, write_line
from router_gateway.requests.request_trace import RequestTrace
from router_gateway.requests.stream import FinishReason
from router_gateway.requests.types import Request
from router_gateway.routing.router import RouteDecision
from stitch.errors import Exhausted, Expired, Forbidden, InvalidRequest, ObjectivesUnmet, Unavailable
from stitch.logs import name_in_log
from stitch.v1 import inference_pb2

# A client ends its call by its own clock, and that may arrive before the deadline computed here: gRPC rounds a timeout
# up by at most this share, and the message takes time.
_TIMEOUT_ROUNDING = 0.01
_TRANSIT_SECONDS = 0.05

_FINISH_OUTCOMES = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_ERROR_OUTCOMES: dict[type[BaseException], str] = {
    InvalidRequest: "invalid",
    Forbidden: "forbidden",
    Exhausted: "exhausted",
    Unavailable: "unavailable",
    Expired: "expired",
    ObjectivesUnmet: "unmet",
    asyncio.CancelledError: "cancelled",
    # The consumer closed the iterator.
    GeneratorExit: "cancelled",
}


class Recorder:
    """`arrival` and `deadline` are times of `clock`, in seconds; `aborting` returns whether the gateway stops."""

    def __init__(
        self,
        arrival: float,
        deadline: float | None,
        metrics: Metrics,
        clock: Callable[[], float],
        aborting: Callable[[], bool],
        write: Write = write_line,
        trace: RequestTrace | None = None,
    ) -> None:
        self.request_id = "without id"
        self.trace = trace or RequestTrace()
        self._arrival = arrival
        self._deadline = deadline
        self._metrics = metrics
        self._clock = clock
        self._aborting = aborting
        self._write = write
        self._route = NO_ROUTE
        self._prompt_tokens = 0
        self._generated_tokens = 0
        # By answer: when its last token came, and the time to its first text.
        self._last_token: dict[int, float] = {}
        self.ttft_seconds: dict[int, float] = {}
        self._queue_seconds = 0.0
        # The gauge that counts the request now.
        self._gauge = metrics.requests_waiting
        self._finish: FinishReason = inference_pb2.FINISH_REASON_UNSPECIFIED
        self._max_ttft_seconds: float | None = None
        self.stages: list[inference_pb2.Stage] = []

    def __enter__(self) -> Self:
        self._gauge.inc()
        return self

    def record_request(self, request: Request) -> None:
        """The client's message is a request."""
        self.request_id = request.request_id
        name_in_log(request.request_id, self.trace.span.trace_id)
        self.trace.request(request)

    def record_prompt(self, tokens: int, max_ttft_seconds: float | None) -> None:
        """The prompt is tokenized."""
        self._prompt_tokens = tokens
        self._max_ttft_seconds = max_ttft_seconds

    def record_decision(self, decision: RouteDecision) -> None:
        """The request has a route."""
        self._route = decision.route
        self._metrics.prompt_tokens.labels(route=self._route).observe(self._prompt_tokens)
        self._metrics.routed.labels(route=self._route, reason=decision.kind).inc()
        if decision.score is not None:
            self._metrics.route_score.observe(decision.score)
        self.trace.decision(decision)

    def record_wait(self, seconds: float) -> None:
        """The request has waited at the gateway until shards had room, which counts as the stage `queue`."""
        self._queue_seconds = seconds

    def record_placement(self) -> None:
        """The request leaves the gateway for its shards."""
        route_seconds = self.elapsed_seconds() - self._queue_seconds
        self._add_stages([inference_pb2.Stage(name="route", seconds=route_seconds)])
        self.trace.placement(route_seconds, self._queue_seconds)
        self._gauge.dec()
        self._gauge = self._metrics.requests_running
        self._gauge.inc()

    def record_tokens(self, count: int, stages: Iterable[inference_pb2.Stage], answer: int = 0) -> None:
        """`count` tokens of an answer came in one step; they share the time since its previous step."""
        if not count:
            return
        if not answer:
            self._add_stages(stages)
        now = self._clock()
        if not self._last_token:
            self.trace.first_token({stage.name: stage.seconds for stage in self.stages if stage.name in STAGES})
        if (last := self._last_token.get(answer)) is not None:
            latency = self._metrics.inter_token_latency.labels(route=self._route)
            for _ in range(count):
                latency.observe((now - last) / count)
        self._last_token[answer] = now
        self._generated_tokens += count
        self._metrics.generated_tokens.labels(route=self._route).inc(count)

    def record_text(self, answer: int = 0) -> None:
        """Text of an answer goes to the client; the first one sets the time to first token."""
        if answer in self.ttft_seconds:
            return
        seconds = self.ttft_seconds[answer] = self.elapsed_seconds()
        if len(self.ttft_seconds) > 1:
            return
        self.trace.first_text(seconds)
        trace_id = self.trace.span.trace_id
        exemplar = {"trace_id": trace_id} if trace_id else None
        self._metrics.time_to_first_token.labels(route=self._route).observe(seconds, exemplar)
        if self._max_ttft_seconds is not None:
            outcome = "met" if seconds <= self._max_ttft_seconds else "missed"
            self._metrics.ttft_objectives.labels(route=self._route, outcome=outcome).inc()
        labels = {"route": self._route, "prompt_bucket": prompt_bucket(self._prompt_tokens)}
        self._metrics.time_to_first_token_by_prompt.labels(**labels).observe(seconds)
        self._metrics.ttft_prompt_tokens.labels(**labels).inc(self._prompt_tokens)

    def record_finish(self, reason: FinishReason) -> None:
        """All answers are complete."""
        self._finish = reason

    def elapsed_seconds(self) -> float:
        """Since the request's arrival."""
        return self._clock() - self._arrival

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gauge.dec()
        outcome = self._outcome(kind)
        self._metrics.request_duration.labels(route=self._route, outcome=outcome).observe(self.elapsed_seconds())
        if outcome in ("cancelled", "expired"):
            self._metrics.cancelled.labels(cause=self._cancel_cause(outcome)).inc()
        counts = f"{self._prompt_tokens} prompt tokens, {self._generated_tokens} generated"
        line = f"request {self.request_id}: {outcome}, route {self._route}, {counts}, {self.elapsed_seconds():.3f} s"
        self._write(outcome, line)
        self.trace.end(outcome, self._prompt_tokens, self._generated_tokens, bool(self._finish))

    def _add_stages(self, stages: Iterable[inference_pb2.Stage]) -> None:
        for stage in stages:
            if stage.name == "queue":
                stage.seconds += self._queue_seconds
            self.stages.append(stage)
            # Shards name stages, and a label's values must be bounded.
            if stage.name in STAGES:
                self._metrics.ttft_stage.labels(stage=stage.name).observe(stage.seconds)

    def _outcome(self, kind: type[BaseException] | None) -> str:
        # The consumer may close the iterator between the last message and the block's end.
        if self._finish:
            return _FINISH_OUTCOMES[self._finish]
        return "failed" if kind is None else _ERROR_OUTCOMES.get(kind, "failed")

    def _cancel_cause(self, outcome: str) -> str:
        expired = self._deadline is not None and self._has_reached(self._deadline)
        if expired or outcome == "expired":
            return "deadline"
        return "shutdown" if self._aborting() else "client"

    def _has_reached(self, deadline: float) -> bool:
        return self._clock() >= deadline - _TRANSIT_SECONDS - _TIMEOUT_ROUNDING * (deadline - self._arrival)
