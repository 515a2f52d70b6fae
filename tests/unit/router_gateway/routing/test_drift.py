"""Shares over a window that moves, and a distance that is 0 for scores that are spread evenly."""

from __future__ import annotations

import math
import random
from bisect import bisect_left

import pytest

from router_gateway.routing.drift import LEAST, WINDOW, Latest


def of_scores(scores: list[float]) -> Latest:
    latest = Latest()
    for score in scores:
        latest.add("weak", score)
    return latest


def test_shares_are_those_of_the_window() -> None:
    latest = Latest(window=4)
    assert latest.share("weak") == 0
    for route in ("strong", "strong", "weak", "weak", "weak", "weak"):
        latest.add(route, 0.5)
    assert (latest.share("weak"), latest.share("strong")) == (1.0, 0.0)
    latest.add("strong", 0.5)
    assert (latest.share("weak"), latest.share("strong"), latest.share("gone")) == (0.75, 0.25, 0.0)


def test_a_few_scores_say_nothing() -> None:
    assert math.isnan(of_scores([0.5] * (LEAST - 1)).drift())
    assert of_scores([0.5] * LEAST).drift() == pytest.approx(0.5)


def test_the_scores_of_the_reference_itself_have_none() -> None:
    draw = random.Random(1)
    gains = sorted(draw.gauss(0, 1) for _ in range(5_000))
    percentiles = [gains[min(round(step / 100 * 4_999), 4_999)] for step in range(101)]
    scores = [bisect_left(percentiles, gain) / len(percentiles) for gain in draw.sample(gains, WINDOW)]
    assert of_scores(scores).drift() < 0.044


@pytest.mark.parametrize(("scores", "distance"), [([0.0], 1.0), ([1.0], 0.99), ([0.25, 0.75], 0.25)])
def test_the_distance_is_the_largest_between_the_shares(scores: list[float], distance: float) -> None:
    assert of_scores(scores * LEAST).drift() == pytest.approx(distance)


def test_harder_texts_are_seen() -> None:
    draw = random.Random(1)
    assert of_scores([draw.random() ** 0.5 for _ in range(WINDOW)]).drift() == pytest.approx(0.25, abs=0.05)


def test_what_left_the_window_is_forgotten() -> None:
    draw = random.Random(1)
    latest = of_scores([1.0] * WINDOW)
    for _ in range(WINDOW):
        latest.add("weak", draw.random())
    assert latest.drift() < 0.05
