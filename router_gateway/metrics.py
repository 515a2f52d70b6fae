"""All metrics of the gateway, with bounded labels; every child is exported from the start, at zero.

The families are in a registry of their own, so that two gateways in one process have separate counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stitch import buckets
from stitch.membership import CHANGES

# The route label of a request that ended before its route was decided.
NO_ROUTE = "none"
OUTCOMES = (
    *("stop", "length", "tool_calls", "invalid", "forbidden", "unmet", "exhausted", "unavailable", "cancelled"),
    *("expired", "failed"),
)
STAGES = ("route", "queue", "bottom_prefill", "wire", "stitch", "top_prefill", "sample")
REPLAY_CAUSES = ("unavailable", "draining", "cancelled", "unreachable", "cut", "out_of_step", "failed", "incompatible")
EJECTION_CAUSES = ("failures", "unreachable", "suspected", "slow")
REFUSAL_REASONS = ("deadline", "queue", "waiting", "rate", "late", "shards")
CANCEL_CAUSES = ("client", "deadline", "shutdown")
# Of a line of times to first token over prompt lengths: seconds, and seconds per token.
FIT_TERMS = ("intercept", "slope")

# Upper bounds in tokens of the prompt lengths by which the time to first token is split.
PROMPT_BOUNDS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPT_BUCKETS = (*(f"le{bound}" for bound in PROMPT_BOUNDS), "over")


class Metrics:
    """The metric families as attributes."""

    def __init__(self, routes: Sequence[str], reasons: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._latencies(routes)
        self._quantities(routes)
        self._events(routes, reasons)
        self._admission()

    def _latencies(self, routes: Sequence[str]) -> None:
        about = "Arrival at the gateway to the first non-empty text."
        name, bounds = "stitch_time_to_first_token", buckets.TIME_TO_FIRST_TOKEN
        self.time_to_first_token = self._histogram(f"{name}_seconds", about, bounds, route=routes)
        about = "Time to first token by prompt length; le64: up to 64 tokens."
        self.time_to_first_token_by_prompt = self._histogram(
            f"{name}_by_prompt_seconds", about, bounds, route=routes, prompt_bucket=PROMPT_BUCKETS
        )
        about = "Tokens of the prompts whose first text has come, by prompt length."
        self.ttft_prompt_tokens = self._counter(
            "stitch_ttft_prompt_tokens_total", about, route=routes, prompt_bucket=PROMPT_BUCKETS
        )
        name, about = "stitch_ttft_fit_seconds", "The line by which times to first token are predicted; NaN: none yet."
        self.ttft_fit = Gauge(name, about, ["route", "term"], registry=self.registry)
        name, about = "stitch_inter_token_latency_seconds", "Between the arrivals of successive tokens at the gateway."
        self.inter_token_latency = self._histogram(name, about, buckets.INTER_TOKEN_LATENCY, route=routes)
        name, about = "stitch_request_duration_seconds", "Arrival at the gateway to the end of the answer."
        self.request_duration = self._histogram(
            name, about, buckets.REQUEST_DURATION, route=(*routes, NO_ROUTE), outcome=OUTCOMES
        )
        name, about = "stitch_ttft_stage_seconds", "Stages of the time to first token, each by one process's clock."
        self.ttft_stage = self._histogram(name, about, buckets.STAGE, stage=STAGES)
        name, about = "stitch_event_loop_delay_seconds", "How late the gateway's event loop wakes up."
        self.event_loop_delay = self._histogram(name, about, buckets.EVENT_LOOP_DELAY)
        name, about = "stitch_event_loop_tasks", "Tasks of the gateway's event loop."
        self.event_loop_tasks = Gauge(name, about, registry=self.registry)

    def _quantities(self, routes: Sequence[str]) -> None:
        name, about = "stitch_prompt_tokens", "Tokens of a prompt."
        self.prompt_tokens = self._histogram(name, about, buckets.PROMPT_TOKENS, route=routes)
        name, about = "stitch_route_score", "How much a query needs the strongest route, 0 to 1."
        self.route_score = self._histogram(name, about, buckets.SCORE)
        name, about = "stitch_route_share", "Share of the latest route decisions, by route."
        self.route_share = Gauge(name, about, ["route"], registry=self.registry)
        for route in routes:
            self.route_share.labels(route=route)
        name, about = (
            "stitch_route_mean_cost",
            "Mean cost of the latest route decisions: 0 all cheapest, 1 all costliest.",
        )
        self.route_mean_cost = Gauge(name, about, registry=self.registry)
        name, about = "stitch_route_budget", "The mean cost that the router is calibrated to; NaN: not calibrated."
        self.route_budget = Gauge(name, about, registry=self.registry)
        name, about = "stitch_route_ready", "Whether a whole chain of shards takes requests of the route."
        self.route_ready = Gauge(name, about, ["route"], registry=self.registry)
        for route in routes:
            self.route_ready.labels(route=route)
        name, about = "stitch_route_drift", "Distance of the latest scores from those of the calibration, 0 to 1."
        self.route_drift = Gauge(name, about, registry=self.registry)
        name, about = "stitch_requests_running", "Requests that run on a chain of shards."
        self.requests_running = Gauge(name, about, registry=self.registry)
        name, about = "stitch_requests_waiting", "Requests accepted that do not run on a chain yet."
        self.requests_waiting = Gauge(name, about, registry=self.registry)

    def _events(self, routes: Sequence[str], reasons: Sequence[str]) -> None:
        name, about = "stitch_generated_tokens_total", "Tokens generated; those of a replay count once."
        self.generated_tokens = self._counter(name, about, route=routes)
        name, about = "stitch_routed_total", "Route decisions of requests, by reason."
        self.routed = self._counter(name, about, route=routes, reason=reasons)
        name, about = (
            "stitch_ttft_objectives_total",
            "Requests with a TTFT objective, by whether they met it.",
        )
        self.ttft_objectives = self._counter(name, about, route=routes, outcome=("met", "missed"))
        name, about = "stitch_replays_total", "Answers continued on another chain after theirs was lost, by cause."
        self.replays = self._counter(name, about, cause=REPLAY_CAUSES)
        name, about = "stitch_drain_refusals_total", "Sessions that a draining shard refused and another chain took."
        self.drain_refusals = Counter(name, about, registry=self.registry)
        name, about = "stitch_ejections_total", "Times that a shard got no new sessions for a while, by cause."
        self.ejections = self._counter(name, about, cause=EJECTION_CAUSES)
        name, about = "stitch_membership_changes_total", "Shards that came or went, and sources that were refused."
        self.membership_changes = self._counter(name, about, kind=CHANGES)
        name, about = "stitch_http_requests_total", "Requests over HTTP, by the path's template and by status."
        self.http_requests = Counter(name, about, ["path", "code"], registry=self.registry)
        name, about = "stitch_cancelled_total", "Answers cancelled before their end, by cause."
        self.cancelled = self._counter(name, about, cause=CANCEL_CAUSES)

    def _admission(self) -> None:
        name, about = "stitch_tenant_requests_running", "Requests of a tenant that run on a chain of shards."
        self.tenant_running = Gauge(name, about, ["tenant"], registry=self.registry)
        name, about = "stitch_tenant_requests_waiting", "Requests of a tenant that wait until shards have room."
        self.tenant_waiting = Gauge(name, about, ["tenant"], registry=self.registry)
        name, about = (
            "stitch_tenant_work_total",
            "Tokens of prompts and answers, times the parameters that their route reads, relative to the costliest.",
        )
        self.tenant_work = self._counter(name, about, tenant=())
        name, about = "stitch_admission_refused_total", "Requests refused with a time at which to come back, by reason."
        self.admission_refused = self._counter(name, about, tenant=(), reason=REFUSAL_REASONS)
        name, about = (
            "stitch_admission_returns_total",
            "Refused requests by what became of them at the time they were told.",
        )
        self.admission_returns = self._counter(name, about, outcome=("admitted", "refused", "absent"))
        name, about = "stitch_admission_limit", "How many requests the shards hold at a time; further ones wait."
        self.admission_limit = Gauge(name, about, registry=self.registry)

    def add_tenants(self, names: Sequence[str]) -> None:
        """Exports the tenants' children, at zero."""
        for name in names:
            for family in (self.tenant_running, self.tenant_waiting, self.tenant_work):
                family.labels(tenant=name)
            for reason in REFUSAL_REASONS:
                self.admission_refused.labels(tenant=name, reason=reason)

    def read_fits(self, routes: Sequence[str], fit: Callable[[str], tuple[float, float]]) -> None:
        """Exports what `fit` returns for each route at a scrape: intercept and slope."""
        for route, (index, term) in product(routes, enumerate(FIT_TERMS)):
            self.ttft_fit.labels(route=route, term=term).set_function(partial(_term, fit, route, index))

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


def _term(fit: Callable[[str], tuple[float, float]], route: str, index: int) -> float:
    return fit(route)[index]


def prompt_bucket(tokens: int) -> str:
    """The label of a prompt with this many tokens."""
    return PROMPT_BUCKETS[bisect_left(PROMPT_BOUNDS, tokens)]


def _combinations(labels: dict[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations of label values; empty without labels, where the family itself is the child."""
    if not labels:
        return []
    return [dict(zip(labels, values, strict=True)) for values in product(*labels.values())]
