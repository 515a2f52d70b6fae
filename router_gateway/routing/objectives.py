"""Which routes meet the objectives of a request, by what is predicted of each route.

A route without a predicted TTFT counts as fast enough, since only requests on it will measure it; a route without a
known cost or quality meets no objective for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from router_gateway.routing.router import DeferredDecision, RouteDecision
from stitch.errors import ObjectivesUnmet


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits of a request; None: no limit."""

    # Arrival at the gateway to the first text.
    max_ttft_seconds: float | None = None
    # Parameters read per token, relative to the most expensive route.
    max_cost: float | None = None
    # In the unit of the router's training labels.
    min_quality: float | None = None

    @property
    def given(self) -> bool:
        """Whether any limit is set."""
        return self != NO_OBJECTIVES


NO_OBJECTIVES = Objectives()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted of a request on one route; None: unknown."""

    route: str
    ttft_seconds: float | None
    cost: float | None
    quality: float | None


def restrict(objectives: Objectives, forecasts: Sequence[Forecast]) -> RouteDecision | DeferredDecision:
    """Leaves the first shard the routes that meet the objectives; where only one does, that is the decision.

    Raises ObjectivesUnmet where none does.
    """
    fitting = _fitting(objectives, forecasts)
    if len(fitting) > 1:
        return DeferredDecision(
            tuple(one.route for one in fitting), lambda decision: apply_objectives(objectives, decision, forecasts)
        )
    route = fitting[0].route
    predicted = "; ".join(_predicted(objectives, one) for one in forecasts)
    return RouteDecision(route, None, f"only {route} meets the objectives: {predicted}", "objective")


def apply_objectives(objectives: Objectives, preferred: RouteDecision, forecasts: Sequence[Forecast]) -> RouteDecision:
    """The preferred decision where its route meets the objectives, else one for another route.

    `forecasts` are of the routes to choose from, cheapest first. Raises ObjectivesUnmet where none meets them.
    """
    chosen = _choose(objectives, preferred.route, _fitting(objectives, forecasts))
    compared = ", ".join(limit.compared for limit in _limits(objectives, chosen))
    if chosen.route == preferred.route:
        return replace(preferred, reason=f"{preferred.reason}; {compared}")
    others = [_predicted(objectives, other) for other in forecasts if other is not chosen]
    preference = f"otherwise it would be {preferred.route} ({preferred.reason})"
    reason = "; ".join([f"{compared} on {chosen.route}", *others, preference])
    return replace(preferred, route=chosen.route, reason=reason, kind="objective")


def _fitting(objectives: Objectives, forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Those that meet every limit, at least one."""
    fitting = [forecast for forecast in forecasts if all(limit.met for limit in _limits(objectives, forecast))]
    if fitting:
        return fitting
    predicted = "; ".join(_predicted(objectives, forecast) for forecast in forecasts)
    required = ", ".join(limit.required for limit in _limits(objectives, forecasts[0]))
    raise ObjectivesUnmet(f"no route meets {required}: {predicted}")


def _choose(objectives: Objectives, preferred: str, fitting: Sequence[Forecast]) -> Forecast:
    """With a minimum quality the cheapest; else the preferred route, or the most expensive where that does not fit."""
    if objectives.min_quality is not None:
        return fitting[0]
    return next((forecast for forecast in fitting if forecast.route == preferred), fitting[-1])


@dataclass(frozen=True, slots=True)
class _Limit:
    """One objective beside the prediction for one route."""

    name: str
    limit: float
    predicted: float | None
    sign: Literal["≤", "≥"]
    unit: str
    # Whether a missing prediction counts as met.
    lenient: bool = False

    @property
    def met(self) -> bool:
        if self.predicted is None:
            return self.lenient
        return self.predicted <= self.limit if self.sign == "≤" else self.predicted >= self.limit

    @property
    def required(self) -> str:
        return f"{self.name} {self.sign} {self.limit:g}{self.unit}"

    @property
    def found(self) -> str:
        if self.predicted is None:
            return f"{self.name} not known yet"
        return f"{self.name} {self.predicted:.2f}{self.unit}"

    @property
    def compared(self) -> str:
        return self.found if self.predicted is None else f"{self.found} {self.sign} {self.limit:g}{self.unit}"


def _limits(objectives: Objectives, forecast: Forecast) -> Iterator[_Limit]:
    """One for every objective that is set."""
    if (seconds := objectives.max_ttft_seconds) is not None:
        yield _Limit("ttft", seconds, forecast.ttft_seconds, "≤", " s", lenient=True)
    if (cost := objectives.max_cost) is not None:
        yield _Limit("cost", cost, forecast.cost, "≤", "")
    if (quality := objectives.min_quality) is not None:
        yield _Limit("quality", quality, forecast.quality, "≥", "")


def _predicted(objectives: Objectives, forecast: Forecast) -> str:
    found = ", ".join(limit.found for limit in _limits(objectives, forecast))
    return f"{forecast.route} has {found}"
