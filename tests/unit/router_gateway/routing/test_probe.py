"""What a shard says of its probe reads like every other judgement."""

from __future__ import annotations

import pytest

from router_gateway.routing.fallback import FallbackRouter
from router_gateway.routing.probe import ProbeRouter, judgement_of
from router_gateway.routing.router import Deferred, Query
from stitch.v1.shard_pb2 import Judged

QUERY = Query(("hello",), ("weak", "strong"))


def test_every_query_is_left_to_the_shard() -> None:
    assert ProbeRouter().judge(QUERY) == Deferred(("weak", "strong"))
    assert FallbackRouter(ProbeRouter()).judge(QUERY) == Deferred(("weak", "strong"))


@pytest.mark.parametrize(
    ("gains", "thresholds", "reason"),
    [
        ([0.0, 0.82], [0.61], "probe 0.82 > 0.61"),
        ([0.0, 0.5], [0.61], "probe 0.50 ≤ 0.61"),
        ([0.0, 0.3, 0.9], [0.2, 0.4], "probe 0.90 > 0.40"),
    ],
)
def test_the_reason_is_the_comparison(gains: list[float], thresholds: list[float], reason: str) -> None:
    judgement = judgement_of(Judged(route="any", score=0.7, gains=gains, thresholds=thresholds))
    assert (judgement.route, judgement.score, judgement.reason, judgement.kind) == ("any", 0.7, reason, "probe")


def test_it_tells_the_probe_s_own_choice_where_that_was_no_candidate() -> None:
    judged = Judged(route="weak", preferred="strong", score=0.7, gains=[0.0, 0.9], thresholds=[0.5])
    assert judgement_of(judged).route == "strong"


@pytest.mark.parametrize(
    ("judged", "why"),
    [
        (Judged(route="strong", failure="the first shard has no probe"), "the first shard has no probe"),
        (Judged(route="strong"), "no gains came"),
        (Judged(route="strong", gains=[0.0, 1.0]), "no gains came"),
    ],
)
def test_without_gains_it_is_the_fallback(judged: Judged, why: str) -> None:
    judgement = judgement_of(judged)
    assert (judgement.route, judgement.kind, judgement.reason) == ("strong", "fallback", f"{why}, so the fallback")
