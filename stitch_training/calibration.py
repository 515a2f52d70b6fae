"""From a budget to thresholds, for any number of routes. Knows no text.

Each route has a cost between 0 (the cheapest) and 1 (the dearest). At a price p for the whole way, a dearer route
pays where its gain exceeds p · cost; the thresholds are those products, and a higher price never raises the mean
cost. So the lowest price whose mean cost keeps to the budget is found by halving. With two routes the budget is the
share of strong calls and the threshold a quantile of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stitch.errors import InvalidRequest
from stitch.thresholds import Thresholds, choose_routes
from stitch_training.recovery import Numbers

# Halvings of the range of prices: far below a float's resolution of gains.
_HALVINGS = 60


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what they come to on the texts that they were chosen on."""

    # One for each route but the cheapest.
    thresholds: tuple[float, ...]
    # The mean relative cost: asked for, and reached.
    budget: float
    cost: float
    # The share of texts on every route.
    shares: tuple[float, ...]

    def thresholds_file(self, routes: Sequence[str], router: str, gains: Numbers, costs: Numbers) -> Thresholds:
        """What a router of that fingerprint reads; `gains` and relative `costs` are those that it was made from."""
        return Thresholds(
            routes=tuple(routes),
            thresholds=self.thresholds,
            router=router,
            budget=self.budget,
            costs=tuple(costs.tolist()),
            gain_percentiles=tuple(np.quantile(gains[:, -1], np.linspace(0, 1, 101)).tolist()),
        )

    def said(self, routes: Sequence[str], prompts: int) -> str:
        """A line for a person."""
        shares = ", ".join(f"{route} {share:.1%}" for route, share in zip(routes, self.shares, strict=True))
        return f"{prompts:,} prompts: {shares}; mean cost {self.cost:.3f} of a budget of {self.budget:.3f}"


def calibrate(gains: Numbers, relative_costs: Numbers, budget: float) -> Calibration:
    """For gains [texts, routes], first column 0, and costs [routes] that rise from 0 to 1.

    Raises InvalidRequest for a budget outside [0, 1].
    """
    if not 0 <= budget <= 1:
        raise InvalidRequest("budget", budget, "it must be from 0 to 1")
    # Beyond every gain by a margin, so that no text pays at the one end and every text at the other.
    reach = 1 + float(np.abs(gains).max() / np.diff(relative_costs).min())
    low, high = -reach, reach
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if _mean_cost(gains, relative_costs, price) <= budget:
            high = price
        else:
            low = price
    thresholds = high * relative_costs[1:]
    taken = choose_routes(gains, thresholds)
    shares = np.bincount(taken, minlength=len(relative_costs)) / len(gains)
    return Calibration(tuple(thresholds.tolist()), budget, float(shares @ relative_costs), tuple(shares.tolist()))


def relative_costs(routes: Sequence[str], costs: Mapping[str, float] | None) -> Numbers:
    """[routes], from 0 to 1: equal steps where no costs are known.

    Raises InvalidRequest where a route has none or they don't rise.
    """
    if costs is None:
        return np.linspace(0, 1, len(routes))
    missing = [route for route in routes if route not in costs]
    if missing:
        raise InvalidRequest("costs", ", ".join(costs), f"there must be one for {', '.join(missing)}")
    values = np.array([costs[route] for route in routes])
    if not (np.diff(values) > 0).all():
        raise InvalidRequest("costs", values.tolist(), f"they must rise in the order {', '.join(routes)}")
    relative: Numbers = (values - values[0]) / (values[-1] - values[0])
    return relative


def budget_for(cost: float, costs: Mapping[str, float], routes: Sequence[str]) -> float:
    """The budget at which a text costs `cost` on average, in the unit of `costs`."""
    cheapest, dearest = costs[routes[0]], costs[routes[-1]]
    if not cheapest <= cost <= dearest:
        raise InvalidRequest("cost", cost, f"the routes cost from {cheapest:g} to {dearest:g}")
    return (cost - cheapest) / (dearest - cheapest)


def _mean_cost(gains: Numbers, costs: Numbers, price: float) -> float:
    return float(costs[choose_routes(gains, price * costs[1:])].mean())
