"""Tests of the window of decisions, of its drift, and of the monitor's gauges and warnings."""

from __future__ import annotations

import logging
import math
import random
from bisect import bisect_left

import pytest

from router_gateway.metrics import Metrics
from router_gateway.routing.drift import DRIFT_LIMIT, MIN_SCORES, WINDOW, DecisionWindow, DriftMonitor
from router_gateway.routing.router import REASON_KINDS, ReasonKind, RouteDecision
from stitch.thresholds import Thresholds


def of_scores(scores: list[float]) -> DecisionWindow:
    latest = DecisionWindow()
    for score in scores:
        latest.add("weak", score)
    return latest


def test_shares_count_the_window_only() -> None:
    latest = DecisionWindow(window=4)
    assert latest.share("weak") == 0
    for route in ("strong", "strong", "weak", "weak", "weak", "weak"):
        latest.add(route, 0.5)
    assert (latest.share("weak"), latest.share("strong")) == (1.0, 0.0)
    latest.add("strong", 0.5)
    assert (latest.share("weak"), latest.share("strong"), latest.share("gone")) == (0.75, 0.25, 0.0)


def test_drift_is_nan_below_min_scores() -> None:
    assert math.isnan(of_scores([0.5] * (MIN_SCORES - 1)).drift())
    assert of_scores([0.5] * MIN_SCORES).drift() == pytest.approx(0.5)


def test_scores_of_the_calibration_texts_have_no_drift() -> None:
    draw = random.Random(1)
    gains = sorted(draw.gauss(0, 1) for _ in range(5_000))
    percentiles = [gains[min(round(step / 100 * 4_999), 4_999)] for step in range(101)]
    scores = [bisect_left(percentiles, gain) / len(percentiles) for gain in draw.sample(gains, WINDOW)]
    assert of_scores(scores).drift() < 0.044


@pytest.mark.parametrize(("scores", "distance"), [([0.0], 1.0), ([1.0], 0.99), ([0.25, 0.75], 0.25)])
def test_drift_is_the_largest_distance_of_distributions(scores: list[float], distance: float) -> None:
    assert of_scores(scores * MIN_SCORES).drift() == pytest.approx(distance)


def test_harder_texts_give_drift() -> None:
    draw = random.Random(1)
    assert of_scores([draw.random() ** 0.5 for _ in range(WINDOW)]).drift() == pytest.approx(0.25, abs=0.05)


def test_scores_outside_the_window_do_not_count() -> None:
    draw = random.Random(1)
    latest = of_scores([1.0] * WINDOW)
    for _ in range(WINDOW):
        latest.add("weak", draw.random())
    assert latest.drift() < 0.05


ROUTES = ("small", "middle", "large")


def thresholds(budget: float = 0.3, costs: tuple[float, ...] | None = None) -> Thresholds:
    return Thresholds(routes=ROUTES, thresholds=(0.1, 0.2), router="f", budget=budget, costs=costs)


class ObservedMonitor:
    """A monitor whose calibration a test replaces."""

    def __init__(self, calibration: Thresholds | None, learned: bool = True) -> None:
        self.calibration = calibration
        self.metrics = Metrics(ROUTES, REASON_KINDS)
        self.monitor = DriftMonitor(self.metrics, (lambda: self.calibration) if learned else None)

    def decide(self, route: str, score: float = 0.5, kind: ReasonKind = "gain", times: int = 1) -> None:
        for _ in range(times):
            self.monitor.observe(RouteDecision(route, score, "", kind), ROUTES)

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"stitch_route_{name}", labels)
        assert value is not None
        return value

    def shares(self) -> list[float]:
        return [self.value("share", route=route) for route in ROUTES]


def test_gauges_exist_before_the_first_decision() -> None:
    observed = ObservedMonitor(None, learned=False)
    assert observed.shares() == [0, 0, 0]
    assert math.isnan(observed.value("budget"))
    assert math.isnan(observed.value("drift"))


def test_gauges_show_shares_cost_and_budget() -> None:
    observed = ObservedMonitor(thresholds(0.3, costs=(0.0, 0.2, 1.0)))
    for route, times in (("small", 5), ("middle", 3), ("large", 2)):
        observed.decide(route, times=times)
    assert observed.shares() == [0.5, 0.3, 0.2]
    assert observed.value("mean_cost") == pytest.approx(0.3 * 0.2 + 0.2)
    assert observed.value("budget") == 0.3


def test_cost_steps_are_equal_without_costs() -> None:
    observed = ObservedMonitor(None)
    observed.decide("middle")
    assert observed.value("mean_cost") == 0.5


def test_requested_and_conversation_routes_do_not_count() -> None:
    observed = ObservedMonitor(thresholds())
    observed.decide("small")
    for kind in ("requested", "conversation"):
        observed.decide("large", kind=kind)
    assert observed.shares() == [1, 0, 0]


def test_new_calibration_empties_the_window() -> None:
    observed = ObservedMonitor(thresholds(0.3))
    observed.decide("large", times=5)
    observed.calibration = thresholds(0.5)
    observed.decide("small")
    assert (observed.value("budget"), observed.shares()) == (0.5, [1, 0, 0])


def test_router_without_calibration_has_no_drift() -> None:
    observed = ObservedMonitor(None, learned=False)
    observed.decide("large", 1.0, times=MIN_SCORES)
    assert math.isnan(observed.value("drift"))


def test_drift_is_logged_once_when_it_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    draw = random.Random(1)
    observed = ObservedMonitor(thresholds())
    for _ in range(WINDOW):
        observed.decide("small", draw.random())
    assert observed.value("drift") < DRIFT_LIMIT
    # Drift of a few hundred random scores may exceed the limit; from here on it does not.
    caplog.clear()
    observed.decide("large", 0.95, times=WINDOW // 2)
    assert observed.value("drift") > DRIFT_LIMIT
    assert [record.message.partition(", limit")[0] for record in caplog.records] == [
        f"router scores drifted by {DRIFT_LIMIT:.2f} from their calibration"
    ]
    for _ in range(WINDOW):
        observed.decide("small", draw.random())
    assert len(caplog.records) == 2
    assert "back at their calibration" in caplog.records[1].message
