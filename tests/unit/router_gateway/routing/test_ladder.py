"""Scores to rungs, at every edge."""

from __future__ import annotations

import pytest

from router_gateway.routing.ladder import Ladder, check_thresholds, equal_steps
from stitch.errors import InvalidRequest


@pytest.mark.parametrize(
    ("score", "route"),
    [(0.0, "small"), (0.29, "small"), (0.3, "middle"), (0.69, "middle"), (0.7, "large"), (1.0, "large")],
)
def test_a_score_at_a_threshold_takes_the_dearer_route(score: float, route: str) -> None:
    assert Ladder([0.3, 0.7]).pick(score, ["small", "middle", "large"])[0] == route


def test_the_comparison_is_said() -> None:
    assert Ladder().pick(0.25, ["weak", "strong"]) == ("weak", "0.25, below 0.50")
    assert Ladder().pick(0.75, ["weak", "strong"]) == ("strong", "0.75, at least 0.50")


def test_one_route_takes_everything() -> None:
    assert Ladder().pick(0.99, ["only"]) == ("only", "0.99, the only route")


def test_by_default_every_route_has_an_equal_part() -> None:
    assert equal_steps(4) == [0.25, 0.5, 0.75]
    assert equal_steps(1) == []


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.6], [0.0], [1.0], [float("nan")]])
def test_thresholds_that_fit_no_two_routes_are_refused(thresholds: list[float]) -> None:
    with pytest.raises(InvalidRequest, match=r"gateway\.thresholds"):
        check_thresholds(thresholds, 2)


def test_falling_thresholds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="rise"):
        check_thresholds([0.6, 0.4], 3)


@pytest.mark.parametrize("thresholds", [None, [0.4]])
def test_thresholds_that_fit_are_taken(thresholds: list[float] | None) -> None:
    check_thresholds(thresholds, 2)
