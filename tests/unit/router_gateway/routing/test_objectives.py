"""What is asked for beside what is predicted decides the route, in words that a person can follow."""

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
def test_where_the_preferred_route_is_too_slow_the_dearest_that_is_not(seconds: float, route: str) -> None:
    assert taken(Objectives(max_ttft_seconds=seconds)) == route


def test_a_cheap_preference_stays_cheap() -> None:
    assert taken(Objectives(max_ttft_seconds=1.0, max_cost=0.6), "small") == "small"


@pytest.mark.parametrize(("cost", "route"), [(1.0, "large"), (0.99, "middle"), (0.25, "small")])
def test_no_route_costs_more_than_it_may(cost: float, route: str) -> None:
    assert taken(Objectives(max_cost=cost)) == route


@pytest.mark.parametrize(("quality", "route"), [(0.0, "small"), (0.4, "small"), (0.5, "middle"), (0.61, "large")])
def test_the_cheapest_route_that_is_good_enough(quality: float, route: str) -> None:
    assert taken(Objectives(min_quality=quality)) == route


def test_all_objectives_are_kept_to_at_once() -> None:
    assert taken(Objectives(max_ttft_seconds=1.0, min_quality=0.5)) == "middle"
    with pytest.raises(ObjectivesUnmet):
        taken(Objectives(max_ttft_seconds=1.0, min_quality=0.7))


def test_a_reason_names_the_objective_that_is_kept_anyway() -> None:
    judged = apply_objectives(Objectives(max_ttft_seconds=2.0), preferring("large"), LADDER)
    assert (judged.reason, judged.kind) == ("gain 0.20 > 0.10; ttft 1.40 s ≤ 2 s", "gain")


def test_a_reason_says_what_an_objective_changed() -> None:
    judged = apply_objectives(Objectives(max_ttft_seconds=1.0), preferring("large"), LADDER[1:])
    wish = "otherwise it would be large (gain 0.20 > 0.10)"
    assert judged.reason == f"ttft 0.80 s ≤ 1 s on middle; large has ttft 1.40 s; {wish}"
    assert (judged.kind, judged.score) == ("objective", 0.7)


def test_a_refusal_has_every_prediction() -> None:
    with pytest.raises(ObjectivesUnmet) as caught:
        apply_objectives(Objectives(max_ttft_seconds=0.25, max_cost=0.5), preferring("large"), LADDER[:2])
    said = "small has ttft 0.50 s, cost 0.25; middle has ttft 0.80 s, cost 0.50"
    assert str(caught.value) == f"no route meets ttft ≤ 0.25 s, cost ≤ 0.5: {said}"


def test_a_route_that_was_not_measured_lately_is_tried() -> None:
    new = Forecast("large", ttft_seconds=None, cost=1.0, quality=None)
    judged = apply_objectives(Objectives(max_ttft_seconds=0.1), preferring("large"), [LADDER[0], new])
    assert (judged.route, judged.reason) == ("large", "gain 0.20 > 0.10; ttft not known yet")


@pytest.mark.parametrize("objectives", [Objectives(max_cost=1.0), Objectives(min_quality=-1e9)])
def test_an_unknown_cost_or_quality_keeps_to_nothing(objectives: Objectives) -> None:
    unknown = Forecast("only", ttft_seconds=0.1, cost=None, quality=None)
    with pytest.raises(ObjectivesUnmet, match=r"only has (cost|quality) not known yet"):
        apply_objectives(objectives, preferring("only"), [unknown])


class TestNarrowed:
    """Where the first shard is to judge."""

    def test_it_judges_between_those_that_keep_to_them(self) -> None:
        deferred = restrict(Objectives(max_ttft_seconds=1.0), LADDER)
        assert isinstance(deferred, DeferredDecision)
        assert deferred.routes == ("small", "middle")
        assert deferred.finalize(preferring("small")).reason == "gain 0.20 > 0.10; ttft 0.50 s ≤ 1 s"
        moved = deferred.finalize(preferring("large"))
        assert (moved.route, moved.kind, moved.score) == ("middle", "objective", 0.7)

    def test_the_only_one_needs_no_judgement(self) -> None:
        judged = restrict(Objectives(max_cost=0.3), LADDER)
        assert isinstance(judged, RouteDecision)
        assert (judged.route, judged.score, judged.kind) == ("small", None, "objective")
        costs = "small has cost 0.25; middle has cost 0.50; large has cost 1.00"
        assert judged.reason == f"only small meets the objectives: {costs}"

    def test_none_is_refused(self) -> None:
        with pytest.raises(ObjectivesUnmet, match=r"no route meets cost ≤ 0\.2"):
            restrict(Objectives(max_cost=0.2), LADDER)
