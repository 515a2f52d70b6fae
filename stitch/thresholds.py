"""From the gains of N routes to one of them, by thresholds that a running program reads again from a file.

A threshold is the least gain over the cheapest route for which a costlier one is taken. Of several routes whose gain
exceeds their threshold, the one that exceeds it by most is taken; with thresholds proportional to the routes' costs
that is the best trade of quality for cost at one price, whatever the number of routes.

`stitch-train calibrate` writes the file. Replacing it changes the budget of a running gateway or shard; an invalid
file leaves the last valid thresholds in force.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from stitch.errors import InvalidRequest
from stitch.reloading import ReloadingFile
from stitch.settings import Settings


class Thresholds(Settings):
    """One threshold for each route but the cheapest, in the labels' unit of quality."""

    # Cheapest first.
    routes: tuple[str, ...] = Field(min_length=1, strict=False)
    thresholds: tuple[float, ...] = Field(strict=False)
    # Fingerprint of the router or probe that they were calibrated for.
    router: str
    # The mean cost that they keep to, from 0 (every text on the cheapest route) to 1 (every text on the costliest).
    budget: float = Field(ge=0, le=1, strict=False)
    # Relative cost of each route, from 0 to 1; None: equal steps.
    costs: tuple[float, ...] | None = Field(default=None, strict=False)
    # The strongest route's gain at 0 %, 1 %, … 100 % of the calibration's texts; None: those of the training.
    gain_percentiles: tuple[float, ...] | None = Field(default=None, min_length=101, max_length=101, strict=False)

    def write(self, path: Path) -> None:
        """Replaces the file in one step, so that a concurrent reader gets either the old file or the new one."""
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(self.model_dump_json(indent=1) + "\n")
        os.replace(fresh, path)


def choose_routes(gains: NDArray[np.floating[Any]], thresholds: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Route indices [texts] for gains [texts, routes], whose first column is 0, and thresholds [routes - 1]."""
    excess = gains - np.concatenate([[0.0], thresholds])
    # argmax takes the first of equals, which is the cheapest.
    best: NDArray[np.int64] = np.argmax(excess, axis=1)
    return best


def gain_score(gain: float, calibration: Thresholds | None, trained: Sequence[float]) -> float:
    """The share, 0 to 1, of texts whose gain on the strongest route is below `gain`.

    The texts are those of the calibration where it has gain percentiles, else those of the training.
    """
    calibrated = None if calibration is None else calibration.gain_percentiles
    percentiles = calibrated or trained
    return bisect_left(percentiles, gain) / len(percentiles)


def decision_reason(source: str, gains: Sequence[float], thresholds: Sequence[float], index: int) -> str:
    """The comparison that decided for route `index`, such as `gain 0.12 > 0.08`.

    For the cheapest route it is the comparison of the route that came nearest to its threshold. `gains` [routes] have
    0 for the cheapest, `thresholds` are [routes - 1]; `source` names what predicted the gains.
    """
    if not thresholds:
        return "the only route"
    if index:
        return f"{source} {gains[index]:.2f} > {thresholds[index - 1]:.2f}"
    nearest = max(range(len(thresholds)), key=lambda route: gains[route + 1] - thresholds[route])
    return f"{source} {gains[nearest + 1]:.2f} ≤ {thresholds[nearest]:.2f}"


class ThresholdSource(Protocol):
    """Where a router reads the thresholds that are in force."""

    def current(self) -> tuple[float, ...]:
        """One threshold for each route but the cheapest."""
        ...

    @property
    def calibration(self) -> Thresholds | None:
        """The calibration that they come from; None: the router's training."""
        ...


class FixedThresholds:
    """Thresholds that never change, such as those of a router's training."""

    calibration = None

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self._thresholds = thresholds

    def current(self) -> tuple[float, ...]:
        return self._thresholds


class ReloadingThresholds:
    """Thresholds of a file that is read again when its date or size changes; invalid content is logged and ignored."""

    def __init__(self, path: Path, router: str | None, routes: int, now: Callable[[], float] = time.monotonic) -> None:
        """`router` is the fingerprint that the file must name; None: any.

        Raises InvalidRequest where the file holds no thresholds, or those of another router or number of routes.
        """
        self._router, self._routes = router, routes
        self._file = ReloadingFile("thresholds", path, self._read, now)

    @property
    def calibration(self) -> Thresholds:
        """The last valid content of the file."""
        return self._file.content

    def current(self) -> tuple[float, ...]:
        return self._file.current().thresholds

    def _read(self, path: Path) -> Thresholds:
        found = read_thresholds(path)
        if self._router not in (None, found.router):
            raise InvalidRequest("thresholds.router", found.router, f"this router is {self._router}")
        if len(found.thresholds) != self._routes - 1:
            limit = f"{self._routes} routes need {self._routes - 1} of them"
            raise InvalidRequest("thresholds.thresholds", found.thresholds, limit)
        if found.costs is not None and len(found.costs) != self._routes:
            limit = f"there must be one for each of {self._routes} routes"
            raise InvalidRequest("thresholds.costs", found.costs, limit)
        return found


def read_thresholds(path: Path) -> Thresholds:
    """Raises InvalidRequest, which names the field, where the file holds no thresholds."""
    try:
        return Thresholds.model_validate(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(map(str, ("thresholds", *first["loc"])))
            raise InvalidRequest(field, first["input"], first["msg"]) from error
        raise InvalidRequest("thresholds", str(path), f"it can't be read: {error}") from error
