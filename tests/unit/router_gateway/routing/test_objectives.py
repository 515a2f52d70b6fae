"""Tests of objectives against forecasts: the route, the reason, and the refusal."""

from __future__ import annotations

import pytest

from router_gateway.routing.objectives import Forecast, Objectives, apply_objectives, restrict
from router_gateway.routing.router import DeferredDecision, RouteDecision
from stitch.errors import ObjectivesUnmet

LADDER = [
    Forecast("small", ttft_seconds=0.5, cost=0.25, quality=0.4),
    Forecast("middle", ttft_seconds=0.8, cost=0.5, quality=0.6),
    Forecast("large", ttft_seconds=1.4, cost=1.0, quality=0.9),
]


def preferring(route: str) -> RouteDecision:
    return RouteDecision(route, 0.7, "gain 0.20 > 0.10", "gain")


def taken(objectives: Objectives, preferred: str = "large") -> str:
    return apply_objectives(objectives, preferring(preferred), LADDER).route


@pytest.mark.parametrize(("seconds", "route"), [(1.5, "large"), (1.4, "large"), (1.39, "middle"), (0.6, "small")])
def test_too_slow_route_is_replaced_by_the_costliest_that_fits(seconds: float, route: str) -> None:
    assert taken(Objectives(max_ttft_seconds=seconds)) == route


def test_preferred_route_that_fits_is_kept() -> None:
    assert taken(Objectives(max_ttft_seconds=1.0, max_cost=0.6), "small") == "small"


@pytest.mark.parametrize(("cost", "route"), [(1.0, "large"), (0.99, "middle"), (0.25, "small")])
def test_max_cost_excludes_costlier_routes(cost: float, route: str) -> None:
    assert taken(Objectives(max_cost=cost)) == route


@pytest.mark.parametrize(("quality", "route"), [(0.0, "small"), (0.4, "small"), (0.5, "middle"), (0.61, "large")])
def test_min_quality_takes_the_cheapest_route_that_fits(quality: float, route: str) -> None:
    assert taken(Objectives(min_quality=quality)) == route


def test_all_objectives_apply_together() -> None:
    assert taken(Objectives(max_ttft_seconds=1.0, min_quality=0.5)) == "middle"
    with pytest.raises(ObjectivesUnmet):
        taken(Objectives(max_ttft_seconds=1.0, min_quality=0.7))


def test_reason_names_an_objective_that_changes_nothing() -> None:
    decision = apply_objectives(Objectives(max_ttft_seconds=2.0), preferring("large"), LADDER)
    assert (decision.reason, decision.kind) == ("gain 0.20 > 0.10; ttft 1.40 s ≤ 2 s", "gain")


def test_reason_names_the_preferred_route_that_an_objective_excludes() -> None:
    decision = apply_objectives(Objectives(max_ttft_seconds=1.0), preferring("large"), LADDER[1:])
    wish = "otherwise it would be large (gain 0.20 > 0.10)"
    assert decision.reason == f"ttft 0.80 s ≤ 1 s on middle; large has ttft 1.40 s; {wish}"
    assert (decision.kind, decision.score) == ("objective", 0.7)


def test_refusal_has_the_prediction_of_every_route() -> None:
    with pytest.raises(ObjectivesUnmet) as caught:
        apply_objectives(Objectives(max_ttft_seconds=0.25, max_cost=0.5), preferring("large"), LADDER[:2])
    predicted = "small has ttft 0.50 s, cost 0.25; middle has ttft 0.80 s, cost 0.50"
    assert str(caught.value) == f"no route meets ttft ≤ 0.25 s, cost ≤ 0.5: {predicted}"


def test_route_without_ttft_prediction_counts_as_fast_enough() -> None:
    new = Forecast("large", ttft_seconds=None, cost=1.0, quality=None)
    decision = apply_objectives(Objectives(max_ttft_seconds=0.1), preferring("large"), [LADDER[0], new])
    assert (decision.route, decision.reason) == ("large", "gain 0.20 > 0.10; ttft not known yet")


@pytest.mark.parametrize("objectives", [Objectives(max_cost=1.0), Objectives(min_quality=-1e9)])
def test_unknown_cost_or_quality_meets_no_objective(objectives: Objectives) -> None:
    unknown = Forecast("only", ttft_seconds=0.1, cost=None, quality=None)
    with pytest.raises(ObjectivesUnmet, match=r"only has (cost|quality) not known yet"):
        apply_objectives(objectives, preferring("only"), [unknown])


class TestNarrowed:
    """Deferred decisions."""

    def test_deferred_decision_has_the_routes_that_fit(self) -> None:
        deferred = restrict(Objectives(max_ttft_seconds=1.0), LADDER)
        assert isinstance(deferred, DeferredDecision)
        assert deferred.routes == ("small", "middle")
        assert deferred.finalize(preferring("small")).reason == "gain 0.20 > 0.10; ttft 0.50 s ≤ 1 s"
        moved = deferred.finalize(preferring("large"))
        assert (moved.route, moved.kind, moved.score) == ("middle", "objective", 0.7)

    def test_only_route_that_fits_is_decided_at_once(self) -> None:
        decision = restrict(Objectives(max_cost=0.3), LADDER)
        assert isinstance(decision, RouteDecision)
        assert (decision.route, decision.score, decision.kind) == ("small", None, "objective")
        costs = "small has cost 0.25; middle has cost 0.50; large has cost 1.00"
        assert decision.reason == f"only small meets the objectives: {costs}"

    def test_no_route_that_fits_is_refused(self) -> None:
        with pytest.raises(ObjectivesUnmet, match=r"no route meets cost ≤ 0\.2"):
            restrict(Objectives(max_cost=0.2), LADDER)
