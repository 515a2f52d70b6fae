"""What the gauges say of the latest judgements, and when the log warns."""

from __future__ import annotations

import logging
import math
import random

import pytest

from router_gateway.metrics import Metrics
from router_gateway.routing.drift import LEAST, WINDOW
from router_gateway.routing.drift_monitor import DRIFT_LIMIT, DriftMonitor
from router_gateway.routing.router import REASON_KINDS, ReasonKind, RouteDecision
from stitch.thresholds import Thresholds

ROUTES = ("small", "middle", "large")


def thresholds(budget: float = 0.3, costs: tuple[float, ...] | None = None) -> Thresholds:
    return Thresholds(routes=ROUTES, thresholds=(0.1, 0.2), router="f", budget=budget, costs=costs)


class Tower:
    """A watch whose calibration a test replaces."""

    def __init__(self, calibration: Thresholds | None, learned: bool = True) -> None:
        self.calibration = calibration
        self.metrics = Metrics(ROUTES, REASON_KINDS)
        self.watch = DriftMonitor(self.metrics, (lambda: self.calibration) if learned else None)

    def judge(self, route: str, score: float = 0.5, kind: ReasonKind = "gain", times: int = 1) -> None:
        for _ in range(times):
            self.watch.judged(RouteDecision(route, score, "", kind), ROUTES)

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"stitch_route_{name}", labels)
        assert value is not None
        return value

    def shares(self) -> list[float]:
        return [self.value("share", route=route) for route in ROUTES]


def test_everything_is_there_before_the_first_judgement() -> None:
    tower = Tower(None, learned=False)
    assert tower.shares() == [0, 0, 0]
    assert math.isnan(tower.value("budget"))
    assert math.isnan(tower.value("drift"))


def test_shares_and_their_cost_stand_beside_the_budget() -> None:
    tower = Tower(thresholds(0.3, costs=(0.0, 0.2, 1.0)))
    for route, times in (("small", 5), ("middle", 3), ("large", 2)):
        tower.judge(route, times=times)
    assert tower.shares() == [0.5, 0.3, 0.2]
    assert tower.value("mean_cost") == pytest.approx(0.3 * 0.2 + 0.2)
    assert tower.value("budget") == 0.3


def test_steps_are_equal_where_no_costs_are_known() -> None:
    tower = Tower(None)
    tower.judge("middle")
    assert tower.value("mean_cost") == 0.5


def test_what_others_decide_is_not_counted() -> None:
    tower = Tower(thresholds())
    tower.judge("small")
    for kind in ("requested", "conversation"):
        tower.judge("large", kind=kind)
    assert tower.shares() == [1, 0, 0]


def test_a_new_calibration_begins_anew() -> None:
    tower = Tower(thresholds(0.3))
    tower.judge("large", times=5)
    tower.calibration = thresholds(0.5)
    tower.judge("small")
    assert (tower.value("budget"), tower.shares()) == (0.5, [1, 0, 0])


def test_hand_set_weights_have_no_drift() -> None:
    tower = Tower(None, learned=False)
    tower.judge("large", 1.0, times=LEAST)
    assert math.isnan(tower.value("drift"))


def test_the_log_warns_once_when_texts_change_and_once_when_they_are_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    draw = random.Random(1)
    tower = Tower(thresholds())
    for _ in range(WINDOW):
        tower.judge("small", draw.random())
    assert tower.value("drift") < DRIFT_LIMIT
    # Random scores may stray among the first few hundred; from here on they don't.
    caplog.clear()
    tower.judge("large", 0.95, times=WINDOW // 2)
    assert tower.value("drift") > DRIFT_LIMIT
    assert [record.message.partition(", more")[0] for record in caplog.records] == [
        f"scores are {DRIFT_LIMIT:.2f} off those of the calibration"
    ]
    for _ in range(WINDOW):
        tower.judge("small", draw.random())
    assert len(caplog.records) == 2
    assert "like those of the calibration again" in caplog.records[1].message
