"""A budget changes while the gateway runs, and a broken file changes nothing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import InvalidRequest
from stitch.thresholds import LOOK_AGAIN_SECONDS, ReloadingThresholds, read_thresholds

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


def test_a_new_file_is_in_force_after_a_look(path: Path) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    assert watched.current() == (0.25,)
    written(path, [0.75])
    clock.now += LOOK_AGAIN_SECONDS / 2
    assert watched.current() == (0.25,)
    clock.now += LOOK_AGAIN_SECONDS
    assert watched.current() == (0.75,)


@pytest.mark.parametrize(
    "broken",
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
def test_a_broken_file_leaves_the_last_thresholds_in_force(
    path: Path, broken: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    written(path, **{"thresholds": [0.5], **broken})
    clock.now += LOOK_AGAIN_SECONDS
    with caplog.at_level(logging.ERROR):
        assert watched.current() == (0.25,)
    assert "stay as they are" in caplog.text


def test_a_broken_file_is_complained_about_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    path.write_text("{")
    for _ in range(3):
        clock.now += LOOK_AGAIN_SECONDS
        watched.current()
    assert len(caplog.records) == 1


def test_a_calibration_is_known_with_its_thresholds(path: Path) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    assert (watched.calibration.budget, watched.calibration.costs) == (0.3, None)
    written(path, [0.75], budget=0.1, costs=[0, 1])
    clock.now += LOOK_AGAIN_SECONDS
    watched.current()
    assert (watched.calibration.budget, watched.calibration.costs) == (0.1, (0.0, 1.0))


def test_a_file_that_vanishes_changes_nothing(path: Path) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    path.unlink()
    clock.now += LOOK_AGAIN_SECONDS
    assert watched.current() == (0.25,)


def test_after_a_broken_file_a_good_one_is_taken(path: Path) -> None:
    clock = Clock()
    watched = ReloadingThresholds(path, ROUTER, 2, clock)
    path.write_text("no")
    clock.now += LOOK_AGAIN_SECONDS
    assert watched.current() == (0.25,)
    written(path, [0.5])
    clock.now += LOOK_AGAIN_SECONDS
    assert watched.current() == (0.5,)


def test_a_gateway_does_not_start_with_thresholds_of_another_router(path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"thresholds\.router"):
        ReloadingThresholds(path, "0" * 64, 2)


def test_a_gateway_does_not_start_with_too_few_thresholds(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="3 routes need 2"):
        ReloadingThresholds(path, ROUTER, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_what_is_no_file_of_thresholds_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match="thresholds"):
        read_thresholds(path)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="absent"):
        read_thresholds(tmp_path / "absent.json")
