"""From gains to rungs."""

from __future__ import annotations

import numpy as np
import pytest

from stitch.rung import chosen, reason, score


@pytest.mark.parametrize(("gain", "rung"), [(-1.0, 0), (0.2, 0), (0.25, 0), (0.26, 1), (1.0, 1)])
def test_of_two_routes_the_dearer_must_exceed_its_threshold(gain: float, rung: int) -> None:
    assert chosen(np.array([[0.0, gain]]), np.array([0.25])).tolist() == [rung]


@pytest.mark.parametrize(
    ("gains", "rung"),
    [
        ([0.0, 0.1, 0.2], 0),
        ([0.0, 0.5, 0.6], 1),
        ([0.0, 0.5, 0.9], 2),
        # The middle rung is passed over where only the last one pays.
        ([0.0, 0.0, 0.6], 2),
    ],
)
def test_of_several_routes_the_one_that_exceeds_most(gains: list[float], rung: int) -> None:
    assert chosen(np.array([gains]), np.array([0.2, 0.4])).tolist() == [rung]


def test_one_route_takes_everything() -> None:
    assert chosen(np.zeros((3, 1)), np.zeros(0)).tolist() == [0, 0, 0]


def test_a_score_is_the_share_of_smaller_gains() -> None:
    percentiles = np.linspace(-1, 1, 101).tolist()
    assert score(-2.0, None, percentiles) == 0.0
    assert score(2.0, None, percentiles) == 1.0
    assert score(0.01, None, percentiles) == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    ("gains", "thresholds", "rung", "said"),
    [
        ([0.0, 0.82], [0.61], 1, "probe 0.82 > 0.61"),
        ([0.0, 0.5], [0.61], 0, "probe 0.50 ≤ 0.61"),
        # The one that came nearest to its threshold, not the largest gain.
        ([0.0, 0.19, 0.3], [0.2, 0.9], 0, "probe 0.19 ≤ 0.20"),
        ([0.0], [], 0, "the only route"),
    ],
)
def test_a_reason_names_the_comparison(gains: list[float], thresholds: list[float], rung: int, said: str) -> None:
    assert reason("probe", gains, thresholds, rung) == said
