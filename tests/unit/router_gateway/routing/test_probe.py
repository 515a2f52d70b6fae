"""Tests of the probe router, and of a shard's probe decision as a route decision."""

from __future__ import annotations

import pytest

from router_gateway.routing.probe import ProbeRouter, from_probe
from router_gateway.routing.router import DeferredDecision, FallbackRouter, Query
from stitch.v1.shard_pb2 import ProbeDecision

QUERY = Query(("hello",), ("weak", "strong"))


def test_probe_router_defers_every_query() -> None:
    assert ProbeRouter().decide(QUERY) == DeferredDecision(("weak", "strong"))
    assert FallbackRouter(ProbeRouter()).decide(QUERY) == DeferredDecision(("weak", "strong"))


@pytest.mark.parametrize(
    ("gains", "thresholds", "reason"),
    [
        ([0.0, 0.82], [0.61], "probe 0.82 > 0.61"),
        ([0.0, 0.5], [0.61], "probe 0.50 ≤ 0.61"),
        ([0.0, 0.3, 0.9], [0.2, 0.4], "probe 0.90 > 0.40"),
    ],
)
def test_reason_is_the_comparison_with_the_threshold(gains: list[float], thresholds: list[float], reason: str) -> None:
    decision = from_probe(ProbeDecision(route="any", score=0.7, gains=gains, thresholds=thresholds))
    assert (decision.route, decision.score, decision.reason, decision.kind) == ("any", 0.7, reason, "probe")


def test_preferred_route_counts_where_it_was_no_candidate() -> None:
    message = ProbeDecision(route="weak", preferred="strong", score=0.7, gains=[0.0, 0.9], thresholds=[0.5])
    assert from_probe(message).route == "strong"


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (ProbeDecision(route="strong", failure="the first shard has no probe"), "the first shard has no probe"),
        (ProbeDecision(route="strong"), "the shard sent no gains"),
        (ProbeDecision(route="strong", gains=[0.0, 1.0]), "the shard sent no gains"),
    ],
)
def test_probe_decision_without_gains_is_the_fallback(message: ProbeDecision, why: str) -> None:
    decision = from_probe(message)
    assert (decision.route, decision.kind, decision.reason) == ("strong", "fallback", f"{why}, so the fallback")
