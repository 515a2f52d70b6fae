"""The spans of one request at the gateway, with the attributes of OpenTelemetry's conventions for generative AI.

In: what the recorder learns of a request. Out: a server span, and under it one for the time until a route is selected.
No attribute has text of the prompt or of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping

from router_gateway.requests.types import Request
from router_gateway.routing.router import RouteDecision
from stitch.telemetry import NO_TRACES, Tracer, stage_attributes, unix_times

# OTLP has signed integers of 64 bits, seeds are unsigned.
MAX_ATTRIBUTE = 2**63 - 1


class RequestTrace:
    """`traceparent` is the client's; `arrival` and `now` are times of one clock, in seconds."""

    def __init__(
        self, tracer: Tracer = NO_TRACES, traceparent: str = "", arrival: float = 0.0, now: float = 0.0
    ) -> None:
        self._tracer = tracer
        self._arrival = unix_times(now)(arrival)
        self.span = tracer.start("generate", traceparent, {"gen_ai.provider.name": "stitch"}, self._arrival)

    def request(self, request: Request) -> None:
        """The request is read."""
        sampling, routing = request.sampling, request.routing
        operation, model = "chat" if isinstance(request.prompt, tuple) else "text_completion", routing.route or "auto"
        attributes: dict[str, str | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": float(sampling.top_k),
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.response.id": request.request_id,
        }
        if sampling.seed <= MAX_ATTRIBUTE:
            attributes["gen_ai.request.seed"] = sampling.seed
        if request.n > 1:
            attributes["gen_ai.request.choice.count"] = request.n
        if routing.conversation_id:
            attributes["gen_ai.conversation.id"] = routing.conversation_id
        self.span.set(attributes, f"{operation} {model}")

    def decision(self, decision: RouteDecision) -> None:
        """The request has a route."""
        attributes: dict[str, str | float] = {"gen_ai.response.model": decision.route, "stitch.reason": decision.kind}
        if decision.score is not None:
            attributes["stitch.score"] = decision.score
        self.span.set(attributes)

    def placement(self, route_seconds: float, queue_seconds: float) -> None:
        """The request leaves for its shards, after it was checked, tokenized and routed, and has waited for room."""
        route = self._tracer.start("route", self.span.traceparent, at=self._arrival, serves=False)
        route.end(at=self._arrival + round(route_seconds * 1e9))
        self.span.event("placed", {"stitch.stage.queue": queue_seconds})

    def first_token(self, stages: Mapping[str, float]) -> None:
        """The first token has come, after these stages in seconds."""
        self.span.event("first_token", stage_attributes(stages))

    def first_text(self, ttft_seconds: float) -> None:
        """The first text goes to the client."""
        self.span.set({"gen_ai.response.time_to_first_chunk": ttft_seconds})

    def end(self, outcome: str, prompt_tokens: int, generated_tokens: int, is_finished: bool) -> None:
        """The request has ended."""
        self.span.set({"gen_ai.usage.input_tokens": prompt_tokens, "gen_ai.usage.output_tokens": generated_tokens})
        if is_finished:
            self.span.set({"gen_ai.response.finish_reasons": [outcome]})
        self.span.end("" if is_finished else outcome)
