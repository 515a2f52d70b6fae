"""From a budget to thresholds, for any number of routes.

Each route has a relative cost from 0 (the cheapest) to 1 (the costliest). At a price p, a costlier route is taken where
its gain exceeds p · cost, so the thresholds are those products, and a higher price never raises the mean cost. The
lowest price whose mean cost keeps to the budget is found by bisection. With two routes the budget is the share of
strong calls and the threshold a quantile of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router_gateway.routing.learned.artifact import load_router
from stitch.errors import InvalidRequest
from stitch.thresholds import Thresholds, choose_routes
from stitch_training.labels import read_prompts
from stitch_training.recovery import Float64Array

# Bisections of the range of prices, which end far below a float's resolution of gains.
_BISECTIONS = 60


@dataclass(frozen=True)
class Calibration:
    """Thresholds, with the mean cost and the shares that they give on the texts they were chosen on."""

    # One for each route but the cheapest.
    thresholds: tuple[float, ...]
    # The mean relative cost that was requested, and the one that was reached.
    budget: float
    cost: float
    # The share of texts on every route.
    shares: tuple[float, ...]

    def to_thresholds(self, routes: Sequence[str], router: str, gains: Float64Array, costs: Float64Array) -> Thresholds:
        """Returns the threshold file for the router with that fingerprint, from its gains and relative costs."""
        return Thresholds(
            routes=tuple(routes),
            thresholds=self.thresholds,
            router=router,
            budget=self.budget,
            costs=tuple(costs.tolist()),
            gain_percentiles=percentiles(gains[:, -1]),
        )

    def summary(self, routes: Sequence[str], prompts: int) -> str:
        """Returns a line with the shares and the mean cost."""
        shares = ", ".join(f"{route} {share:.1%}" for route, share in zip(routes, self.shares, strict=True))
        return f"{prompts:,} prompts: {shares}; mean cost {self.cost:.3f} of a budget of {self.budget:.3f}"


def percentiles(gains: Float64Array) -> tuple[float, ...]:
    """Returns the 0th, 1st, … 100th percentile of gains [texts]."""
    return tuple(np.quantile(gains, np.linspace(0, 1, 101)).tolist())


def calibrate(gains: Float64Array, relative_costs: Float64Array, budget: float) -> Calibration:
    """Chooses thresholds for gains [texts, routes], first column 0, and costs [routes] that rise from 0 to 1.

    Raises InvalidRequest for a budget outside [0, 1].
    """
    check_budget(budget)
    # Prices beyond every gain: at one end no text takes a costlier route, at the other every text does.
    reach = 1 + float(np.abs(gains).max() / np.diff(relative_costs).min())
    low, high = -reach, reach
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        if _mean_cost(gains, relative_costs, price) <= budget:
            high = price
        else:
            low = price
    thresholds = high * relative_costs[1:]
    routes = choose_routes(gains, thresholds)
    shares = np.bincount(routes, minlength=len(relative_costs)) / len(gains)
    return Calibration(tuple(thresholds.tolist()), budget, float(shares @ relative_costs), tuple(shares.tolist()))


def check_budget(budget: float) -> None:
    """Raises InvalidRequest for a budget outside [0, 1]."""
    if not 0 <= budget <= 1:
        raise InvalidRequest("budget", budget, "it must be from 0 to 1")


def relative_costs(routes: Sequence[str], costs: Mapping[str, float] | None) -> Float64Array:
    """Returns costs [routes] from 0 to 1: equal steps where no costs are given.

    Raises InvalidRequest where a route has no cost, or the costs don't rise.
    """
    if costs is None:
        return np.linspace(0, 1, len(routes))
    missing = [route for route in routes if route not in costs]
    if missing:
        raise InvalidRequest("costs", ", ".join(costs), f"there must be one for {', '.join(missing)}")
    values = np.array([costs[route] for route in routes])
    if not (np.diff(values) > 0).all():
        raise InvalidRequest("costs", values.tolist(), f"they must rise in the order {', '.join(routes)}")
    relative: Float64Array = (values - values[0]) / (values[-1] - values[0])
    return relative


def budget_for(cost: float, costs: Mapping[str, float], routes: Sequence[str]) -> float:
    """Returns the budget at which a text costs `cost` on average, in the unit of `costs`."""
    cheapest, costliest = costs[routes[0]], costs[routes[-1]]
    if not cheapest <= cost <= costliest:
        raise InvalidRequest("cost", cost, f"the routes cost from {cheapest:g} to {costliest:g}")
    return (cost - cheapest) / (costliest - cheapest)


def resolve_budget(
    budget: float | None, cost: float | None, costs: Mapping[str, float] | None, routes: Sequence[str]
) -> tuple[float, Float64Array]:
    """Returns the budget and the relative costs [routes], from a budget or a mean `cost` in the unit of `costs`.

    Raises InvalidRequest for a cost without the cost of every route.
    """
    relative = relative_costs(routes, costs)
    if budget is not None:
        check_budget(budget)
        return budget, relative
    if costs is None or cost is None:
        raise InvalidRequest("costs", dict(costs or {}), "--cost needs the cost of every route")
    return budget_for(cost, costs, routes), relative


def calibrate_router(
    path: Path, data: Sequence[Path], budget: float | None, cost: float | None, costs: Mapping[str, float] | None
) -> tuple[Thresholds, str]:
    """Calibrates a learned router on prompts, which need no labels; returns its thresholds and their summary.

    Raises InvalidRequest where the artifact, the data or the target is invalid.
    """
    artifact = load_router(path)
    routes = artifact.model.routes
    budget, relative = resolve_budget(budget, cost, costs, routes)
    prompts = [prompt for file in data for prompt in read_prompts(file)]
    gains = np.array([artifact.model.gains(prompt) for prompt in prompts], np.float64)
    found = calibrate(gains, relative, budget)
    return found.to_thresholds(routes, artifact.fingerprint, gains, relative), found.summary(routes, len(prompts))


def _mean_cost(gains: Float64Array, costs: Float64Array, price: float) -> float:
    return float(costs[choose_routes(gains, price * costs[1:])].mean())
