"""What a gain must be for a dearer route to pay, in a file that a running gateway reads again. Knows no model.

`router-gateway calibrate` writes such a file; replacing it changes the budget of a running gateway, and a file that is
broken changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pydantic import Field, ValidationError

from stitch.errors import InvalidRequest
from stitch.settings import Settings

_log = logging.getLogger(__name__)

# A change is seen after this at most, and judging reads the file's date no more often.
LOOK_AGAIN_SECONDS = 1.0


class Thresholds(Settings):
    """One threshold for each route but the cheapest, in the labels' unit of quality."""

    # Cheapest first.
    routes: tuple[str, ...] = Field(min_length=1, strict=False)
    thresholds: tuple[float, ...] = Field(strict=False)
    # The artefact that they were calibrated for.
    router: str
    # What they were calibrated to: the mean cost between all cheapest (0) and all dearest (1).
    budget: float = Field(ge=0, le=1, strict=False)
    # That cost by route, from 0 to 1; None: equal steps.
    costs: tuple[float, ...] | None = Field(default=None, strict=False)
    # The strongest route's gain at 0 %, 1 %, … 100 % of the texts of the calibration; None: as in the training.
    gain_percentiles: tuple[float, ...] | None = Field(default=None, min_length=101, max_length=101, strict=False)

    def write(self, path: Path) -> None:
        """In one step, so that whoever reads it meanwhile sees the old file or the new one."""
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(self.model_dump_json(indent=1) + "\n")
        os.replace(fresh, path)


class ThresholdSource(Protocol):
    """Where a router finds the thresholds of this moment."""

    def current(self) -> tuple[float, ...]:
        """One for each route but the cheapest."""
        ...

    @property
    def calibration(self) -> Thresholds | None:
        """Where they come from; None: from the router's training."""
        ...


class FixedThresholds:
    """The same ones always."""

    calibration = None

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        self._thresholds = thresholds

    def current(self) -> tuple[float, ...]:
        return self._thresholds


class ReloadingThresholds:
    """Those of a file, read again when its date or size changes; what can't be read leaves the last ones in force."""

    def __init__(self, path: Path, router: str | None, routes: int, now: Callable[[], float] = time.monotonic) -> None:
        """`router` is the fingerprint that they must be for; None: any.

        Raises InvalidRequest where the file is none of thresholds, or of others.
        """
        self._path, self._router, self._routes, self._now = path, router, routes, now
        self._stamp = _stamp(path)
        self.calibration = self._read()
        self._look_at = now() + LOOK_AGAIN_SECONDS

    def current(self) -> tuple[float, ...]:
        if self._now() >= self._look_at:
            self._look_at = self._now() + LOOK_AGAIN_SECONDS
            self._look()
        return self.calibration.thresholds

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp in (None, self._stamp):
            return
        self._stamp = stamp
        try:
            self.calibration = self._read()
        except InvalidRequest as error:
            _log.error("the thresholds stay as they are: %s", error)
        else:
            thresholds = self.calibration.thresholds
            _log.info("new thresholds: %s", ", ".join(f"{threshold:.3f}" for threshold in thresholds))

    def _read(self) -> Thresholds:
        found = read_thresholds(self._path)
        if self._router not in (None, found.router):
            raise InvalidRequest("thresholds.router", found.router, f"this router is {self._router}")
        if len(found.thresholds) != self._routes - 1:
            limit = f"{self._routes} routes need {self._routes - 1} of them"
            raise InvalidRequest("thresholds.thresholds", found.thresholds, limit)
        if found.costs is not None and len(found.costs) != self._routes:
            raise InvalidRequest(
                "thresholds.costs", found.costs, f"there must be one for each of {self._routes} routes"
            )
        return found


def read_thresholds(path: Path) -> Thresholds:
    """Raises InvalidRequest, naming the field, where the file is none of thresholds."""
    try:
        return Thresholds.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(map(str, ("thresholds", *first["loc"])))
            raise InvalidRequest(field, first["input"], first["msg"]) from error
        raise InvalidRequest("thresholds", str(path), f"it can't be read: {error}") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_size
