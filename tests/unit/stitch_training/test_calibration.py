"""Thresholds from budgets, for two routes and for more."""

from __future__ import annotations

import numpy as np
import pytest

from stitch.errors import InvalidRequest
from stitch_training.calibration import budget_for, calibrate, relative_costs
from stitch_training.recovery import Float64Array


def gains(*columns: Float64Array) -> Float64Array:
    return np.stack([np.zeros(len(columns[0])), *columns], axis=1)


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_share_of_two_routes_is_the_budget(budget: float) -> None:
    found = calibrate(gains(np.random.default_rng(0).normal(size=1_000)), np.array([0.0, 1.0]), budget)
    assert found.shares == pytest.approx((1 - budget, budget), abs=0.002)
    assert found.cost <= budget


def test_threshold_of_two_routes_is_the_quantile_of_the_gain() -> None:
    gain = np.linspace(-0.5, 0.5, 101)
    [threshold] = calibrate(gains(gain), np.array([0.0, 1.0]), 0.25).thresholds
    assert 0.24 <= threshold < 0.26


def test_threshold_falls_with_the_budget() -> None:
    gain = gains(np.random.default_rng(1).normal(size=500))
    found = [calibrate(gain, np.array([0.0, 1.0]), budget / 10).thresholds[0] for budget in range(11)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("budget", [0.1, 0.4, 0.8])
def test_mean_cost_of_three_routes_keeps_to_the_budget(budget: float) -> None:
    draw = np.random.default_rng(2)
    middle = draw.random(2_000)
    found = calibrate(gains(middle, middle + draw.random(2_000)), np.array([0.0, 0.4, 1.0]), budget)
    assert found.cost <= budget
    assert found.cost == pytest.approx(budget, abs=0.01)
    assert found.thresholds[0] == pytest.approx(0.4 * found.thresholds[1])


def test_every_route_worth_its_cost_is_used() -> None:
    draw = np.random.default_rng(3)
    middle = draw.random(2_000)
    found = calibrate(gains(middle, middle + 0.8 * draw.random(2_000)), np.array([0.0, 0.5, 1.0]), 0.5)
    assert all(share > 0.1 for share in found.shares)


def test_equal_gains_stay_below_the_budget() -> None:
    assert calibrate(gains(np.full(10, 0.3)), np.array([0.0, 1.0]), 0.5).shares == (1.0, 0.0)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(InvalidRequest, match="budget"):
        calibrate(gains(np.ones(3)), np.array([0.0, 1.0]), budget)


def test_relative_costs_are_equal_steps_or_as_given() -> None:
    routes = ("a", "b", "c")
    assert relative_costs(routes, None).tolist() == [0.0, 0.5, 1.0]
    assert relative_costs(routes, {"a": 10, "b": 12, "c": 20}).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert budget_for(15, {"a": 10, "b": 12, "c": 20}, routes) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("costs", "message"),
    [({"a": 1.0}, "one for b"), ({"a": 2.0, "b": 1.0}, "rise"), ({"a": 1.0, "b": 1.0}, "rise")],
)
def test_invalid_costs_are_refused(costs: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        relative_costs(("a", "b"), costs)


@pytest.mark.parametrize("cost", [9.0, 21.0])
def test_unreachable_cost_is_refused(cost: float) -> None:
    with pytest.raises(InvalidRequest, match="from 10 to 20"):
        budget_for(cost, {"a": 10.0, "b": 20.0}, ("a", "b"))
