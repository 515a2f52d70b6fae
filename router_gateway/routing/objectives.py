"""Which route keeps to what a request asks for, by what is predicted of each. Predicts nothing itself.

A prediction that is missing is no reason to refuse a first text's time, which only measuring will tell; a cost or a
quality that is not known is not kept to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from router_gateway.routing.router import DeferredDecision, RouteDecision
from stitch.errors import ObjectivesUnmet


@dataclass(frozen=True, slots=True)
class Objectives:
    """None: anything will do."""

    # Arrival at the gateway to the first text.
    max_ttft_seconds: float | None = None
    # Parameters read for a token, as a share of the dearest route's.
    max_cost: float | None = None
    # In the unit of the labels that taught the router.
    min_quality: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self != ANYTHING


ANYTHING = Objectives()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted of a request on one route; None: nothing is known."""

    route: str
    ttft_seconds: float | None
    cost: float | None
    quality: float | None


def narrowed(objectives: Objectives, forecasts: Sequence[Forecast]) -> RouteDecision | DeferredDecision:
    """The routes that keep to the objectives, where the first shard is to judge; the only one needs no judgement.

    Raises ObjectivesUnmet where none does.
    """
    fitting = _fitting(objectives, forecasts)
    if len(fitting) > 1:
        return DeferredDecision(
            tuple(one.route for one in fitting), lambda found: settled(objectives, found, forecasts)
        )
    reason = "; ".join(_said(objectives, one) for one in forecasts)
    return RouteDecision(
        fitting[0].route, None, f"only {fitting[0].route} keeps to the objectives: {reason}", "objective"
    )


def settled(objectives: Objectives, preferred: RouteDecision, forecasts: Sequence[Forecast]) -> RouteDecision:
    """The judgement that keeps to the objectives; `forecasts` are of the routes to choose from, cheapest first.

    Raises ObjectivesUnmet where none does.
    """
    taken = _taken(objectives, preferred.route, _fitting(objectives, forecasts))
    compared = ", ".join(check.compared for check in _checks(objectives, taken))
    if taken.route == preferred.route:
        return replace(preferred, reason=f"{preferred.reason}; {compared}")
    others = [_said(objectives, other) for other in forecasts if other is not taken]
    wish = f"otherwise it would be {preferred.route} ({preferred.reason})"
    reason = "; ".join([f"{compared} on {taken.route}", *others, wish])
    return replace(preferred, route=taken.route, reason=reason, kind="objective")


def _fitting(objectives: Objectives, forecasts: Sequence[Forecast]) -> list[Forecast]:
    fitting = [forecast for forecast in forecasts if all(check.kept for check in _checks(objectives, forecast))]
    if fitting:
        return fitting
    found = "; ".join(_said(objectives, forecast) for forecast in forecasts)
    asked = ", ".join(check.asked for check in _checks(objectives, forecasts[0]))
    raise ObjectivesUnmet(f"no route keeps to {asked}: {found}")


def _taken(objectives: Objectives, preferred: str, fitting: Sequence[Forecast]) -> Forecast:
    """The cheapest that is good enough; where that was not asked for, the preferred one, else the dearest."""
    if objectives.min_quality is not None:
        return fitting[0]
    return next((forecast for forecast in fitting if forecast.route == preferred), fitting[-1])


@dataclass(frozen=True, slots=True)
class _Check:
    """One limit beside one prediction."""

    name: str
    limit: float
    predicted: float | None
    sign: Literal["≤", "≥"]
    unit: str
    # Whether a missing prediction counts as kept.
    lenient: bool = False

    @property
    def kept(self) -> bool:
        if self.predicted is None:
            return self.lenient
        return self.predicted <= self.limit if self.sign == "≤" else self.predicted >= self.limit

    @property
    def asked(self) -> str:
        return f"{self.name} {self.sign} {self.limit:g}{self.unit}"

    @property
    def found(self) -> str:
        if self.predicted is None:
            return f"{self.name} not known yet"
        return f"{self.name} {self.predicted:.2f}{self.unit}"

    @property
    def compared(self) -> str:
        return self.found if self.predicted is None else f"{self.found} {self.sign} {self.limit:g}{self.unit}"


def _checks(objectives: Objectives, forecast: Forecast) -> Iterator[_Check]:
    """One for every objective that is given."""
    if (seconds := objectives.max_ttft_seconds) is not None:
        yield _Check("ttft", seconds, forecast.ttft_seconds, "≤", " s", lenient=True)
    if (cost := objectives.max_cost) is not None:
        yield _Check("cost", cost, forecast.cost, "≤", "")
    if (quality := objectives.min_quality) is not None:
        yield _Check("quality", quality, forecast.quality, "≥", "")


def _said(objectives: Objectives, forecast: Forecast) -> str:
    found = ", ".join(check.found for check in _checks(objectives, forecast))
    return f"{forecast.route} has {found}"
