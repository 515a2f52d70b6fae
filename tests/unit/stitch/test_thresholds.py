"""Routes chosen by gains and thresholds, and a file of thresholds that is replaced while a program runs."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stitch.errors import InvalidRequest
from stitch.reloading import RELOAD_INTERVAL_SECONDS
from stitch.thresholds import (
    ReloadingThresholds,
    choose_routes,
    decision_reason,
    gain_score,
    read_thresholds,
)

ROUTER = "f" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def written(path: Path, thresholds: Any = (0.25,), **fields: Any) -> Path:
    content = {"routes": ["weak", "strong"], "thresholds": thresholds, "router": ROUTER, "budget": 0.3, **fields}
    path.write_text(json.dumps(content))
    # Two writes within one tick of the file system's clock still differ.
    ticks = path.stat().st_mtime_ns + written_before.setdefault(path, 0)
    written_before[path] += 1_000_000
    os.utime(path, ns=(ticks, ticks))
    return path


written_before: dict[Path, int] = {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "thresholds.json")


def test_replaced_file_is_in_force_after_the_reload_interval(path: Path) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    assert source.current() == (0.25,)
    written(path, [0.75])
    clock.now += RELOAD_INTERVAL_SECONDS / 2
    assert source.current() == (0.25,)
    clock.now += RELOAD_INTERVAL_SECONDS
    assert source.current() == (0.75,)


@pytest.mark.parametrize(
    "invalid",
    [
        {"thresholds": [0.1, 0.2]},
        {"thresholds": ["high"]},
        {"thresholds": None},
        {"router": "0" * 64},
        {"budget": 2},
        {"costs": [0.0, 0.5, 1.0]},
        {"gain_percentiles": [0.0, 1.0]},
        {"surprise": 1},
    ],
)
def test_invalid_file_leaves_the_last_thresholds_in_force(
    path: Path, invalid: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    written(path, **{"thresholds": [0.5], **invalid})
    clock.now += RELOAD_INTERVAL_SECONDS
    with caplog.at_level(logging.ERROR):
        assert source.current() == (0.25,)
    assert "stay as they are" in caplog.text


def test_invalid_file_is_logged_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    path.write_text("{")
    for _ in range(3):
        clock.now += RELOAD_INTERVAL_SECONDS
        source.current()
    assert len(caplog.records) == 1


def test_calibration_changes_with_its_thresholds(path: Path) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    assert (source.calibration.budget, source.calibration.costs) == (0.3, None)
    written(path, [0.75], budget=0.1, costs=[0, 1])
    clock.now += RELOAD_INTERVAL_SECONDS
    source.current()
    assert (source.calibration.budget, source.calibration.costs) == (0.1, (0.0, 1.0))


def test_removed_file_leaves_the_last_thresholds_in_force(path: Path) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    path.unlink()
    clock.now += RELOAD_INTERVAL_SECONDS
    assert source.current() == (0.25,)


def test_valid_file_after_an_invalid_one_is_in_force(path: Path) -> None:
    clock = Clock()
    source = ReloadingThresholds(path, ROUTER, 2, clock)
    path.write_text("no")
    clock.now += RELOAD_INTERVAL_SECONDS
    assert source.current() == (0.25,)
    written(path, [0.5])
    clock.now += RELOAD_INTERVAL_SECONDS
    assert source.current() == (0.5,)


def test_thresholds_of_another_router_are_refused(path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"thresholds\.router"):
        ReloadingThresholds(path, "0" * 64, 2)


def test_too_few_thresholds_are_refused(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="3 routes need 2"):
        ReloadingThresholds(path, ROUTER, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_file_without_thresholds_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match="thresholds"):
        read_thresholds(path)


def test_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        read_thresholds(tmp_path / "absent.json")


@pytest.mark.parametrize(("gain", "index"), [(-1.0, 0), (0.2, 0), (0.25, 0), (0.26, 1), (1.0, 1)])
def test_costlier_route_is_chosen_only_above_its_threshold(gain: float, index: int) -> None:
    assert choose_routes(np.array([[0.0, gain]]), np.array([0.25])).tolist() == [index]


@pytest.mark.parametrize(
    ("gains", "index"),
    [
        ([0.0, 0.1, 0.2], 0),
        ([0.0, 0.5, 0.6], 1),
        ([0.0, 0.5, 0.9], 2),
        # The middle route is skipped where only the costliest exceeds its threshold.
        ([0.0, 0.0, 0.6], 2),
    ],
)
def test_of_several_routes_the_one_with_the_largest_excess_is_chosen(gains: list[float], index: int) -> None:
    assert choose_routes(np.array([gains]), np.array([0.2, 0.4])).tolist() == [index]


def test_single_route_is_chosen_for_every_text() -> None:
    assert choose_routes(np.zeros((3, 1)), np.zeros(0)).tolist() == [0, 0, 0]


def test_gain_score_is_the_share_of_smaller_gains() -> None:
    percentiles = np.linspace(-1, 1, 101).tolist()
    assert gain_score(-2.0, None, percentiles) == 0.0
    assert gain_score(2.0, None, percentiles) == 1.0
    assert gain_score(0.01, None, percentiles) == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    ("gains", "thresholds", "index", "reason"),
    [
        ([0.0, 0.82], [0.61], 1, "probe 0.82 > 0.61"),
        ([0.0, 0.5], [0.61], 0, "probe 0.50 ≤ 0.61"),
        # The route that came nearest to its threshold, which is not the one with the largest gain.
        ([0.0, 0.19, 0.3], [0.2, 0.9], 0, "probe 0.19 ≤ 0.20"),
        ([0.0], [], 0, "the only route"),
    ],
)
def test_decision_reason_names_the_comparison_that_decided(
    gains: list[float], thresholds: list[float], index: int, reason: str
) -> None:
    assert decision_reason("probe", gains, thresholds, index) == reason
