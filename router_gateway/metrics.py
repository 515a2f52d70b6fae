"""Every metric of the gateway, each with its bounded labels, at zero from the start. Knows no request.

The families live in a registry of their own, so that two gateways in one process don't meet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stitch import buckets

# Label of a request that ended before it had a route.
NO_ROUTE = "none"
OUTCOMES = ("stop", "length", "invalid", "unmet", "exhausted", "unavailable", "cancelled", "expired", "failed")
STAGES = ("route", "queue", "bottom_prefill", "wire", "stitch", "top_prefill", "sample")
REPLAY_CAUSES = ("unavailable", "cancelled", "unreachable", "cut", "out_of_step")
CANCEL_CAUSES = ("client", "deadline", "shutdown")

# Upper ends of the prompt lengths by which the time to the first token is shown, in tokens.
PROMPT_BOUNDS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPT_BUCKETS = (*(f"le{bound}" for bound in PROMPT_BOUNDS), "over")


class Metrics:
    """The families as attributes."""

    def __init__(self, routes: Sequence[str], reasons: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._latencies(routes)
        self._quantities(routes)
        self._events(routes, reasons)

    def _latencies(self, routes: Sequence[str]) -> None:
        about = "Arrival at the gateway to the first non-empty text."
        name, bounds = "stitch_time_to_first_token", buckets.TIME_TO_FIRST_TOKEN
        self.time_to_first_token = self._histogram(f"{name}_seconds", about, bounds, route=routes)
        about = "The same by the prompt's length; le64 is up to 64 tokens."
        self.time_to_first_token_by_prompt = self._histogram(
            f"{name}_by_prompt_seconds", about, bounds, route=routes, prompt_bucket=PROMPT_BUCKETS
        )
        name, about = "stitch_inter_token_latency_seconds", "From one token's arrival at the gateway to the next one's."
        self.inter_token_latency = self._histogram(name, about, buckets.INTER_TOKEN_LATENCY, route=routes)
        name, about = "stitch_request_duration_seconds", "Arrival at the gateway to the end of the answer."
        self.request_duration = self._histogram(
            name, about, buckets.REQUEST_DURATION, route=(*routes, NO_ROUTE), outcome=OUTCOMES
        )
        name, about = "stitch_ttft_stage_seconds", "Where the time to the first token went; each stage by one clock."
        self.ttft_stage = self._histogram(name, about, buckets.STAGE, stage=STAGES)
        name, about = "stitch_event_loop_delay_seconds", "How late the gateway's event loop wakes up."
        self.event_loop_delay = self._histogram(name, about, buckets.EVENT_LOOP_DELAY)

    def _quantities(self, routes: Sequence[str]) -> None:
        name, about = "stitch_prompt_tokens", "Tokens of a prompt."
        self.prompt_tokens = self._histogram(name, about, buckets.PROMPT_TOKENS, route=routes)
        name, about = "stitch_route_score", "How much a query asks for the strongest route."
        self.route_score = self._histogram(name, about, buckets.SCORE)
        name, about = "stitch_route_share", "Of the latest judgements, by route."
        self.route_share = Gauge(name, about, ["route"], registry=self.registry)
        for route in routes:
            self.route_share.labels(route=route)
        name, about = "stitch_route_mean_cost", "Of the latest judgements: 0 all cheapest, 1 all dearest."
        self.route_mean_cost = Gauge(name, about, registry=self.registry)
        name, about = "stitch_route_budget", "The mean cost that the router is calibrated to; NaN: to none."
        self.route_budget = Gauge(name, about, registry=self.registry)
        name, about = "stitch_route_drift", "How far the latest scores are off those of the calibration, 0 to 1."
        self.route_drift = Gauge(name, about, registry=self.registry)
        name, about = "stitch_requests_running", "Requests handed to a chain."
        self.requests_running = Gauge(name, about, registry=self.registry)
        name, about = "stitch_requests_waiting", "Requests accepted and not yet handed to a chain."
        self.requests_waiting = Gauge(name, about, registry=self.registry)

    def _events(self, routes: Sequence[str], reasons: Sequence[str]) -> None:
        name, about = "stitch_generated_tokens_total", "Tokens generated; those of a replay count once."
        self.generated_tokens = self._counter(name, about, route=routes)
        name, about = "stitch_routed_total", "Judgements that led to a route."
        self.routed = self._counter(name, about, route=routes, reason=reasons)
        name, about = "stitch_ttft_objectives_total", "First texts of requests with an objective for them."
        self.ttft_objectives = self._counter(name, about, route=routes, outcome=("met", "missed"))
        name, about = "stitch_replays_total", "Answers resumed on a chain after another one was lost."
        self.replays = self._counter(name, about, cause=REPLAY_CAUSES)
        name, about = "stitch_cancelled_total", "Answers that nobody waited for to the end."
        self.cancelled = self._counter(name, about, cause=CANCEL_CAUSES)

    def _histogram(self, name: str, about: str, bounds: Sequence[float], **labels: Sequence[str]) -> Histogram:
        family = Histogram(name, about, list(labels), buckets=bounds, registry=self.registry)
        for values in _combinations(labels):
            family.labels(**values)
        return family

    def _counter(self, name: str, about: str, **labels: Sequence[str]) -> Counter:
        family = Counter(name, about, list(labels), registry=self.registry)
        for values in _combinations(labels):
            family.labels(**values)
        return family


def prompt_bucket(tokens: int) -> str:
    """The label of a prompt with so many tokens."""
    return PROMPT_BUCKETS[bisect_left(PROMPT_BOUNDS, tokens)]


def _combinations(labels: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """All values of all labels; none where there is no label, for then the family itself is the child."""
    if not labels:
        return []
    return [dict(zip(labels, values, strict=True)) for values in product(*labels.values())]
