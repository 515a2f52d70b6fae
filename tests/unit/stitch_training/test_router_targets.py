"""What the router's regression learns: gains, or their ranks, and the choice between both."""

from __future__ import annotations

import numpy as np
import pytest

from stitch_training.router_targets import best_target, mean_apgr, ranked, target_qualities


def test_ranks_keep_order_mean_and_deviation_and_bound_outliers() -> None:
    gains = np.array([0.0, 0.1, 0.1, 0.2, 100.0])
    found = ranked(gains)
    assert found[0] < found[1] == found[2] < found[3] < found[4]
    assert (found.mean(), found.std()) == pytest.approx((gains.mean(), gains.std()))
    assert found[4] - found[3] == pytest.approx(found[1] - found[0], rel=0.5)


def test_equal_gains_have_their_own_mean() -> None:
    assert ranked(np.full(3, 0.25)).tolist() == [0.25] * 3


def test_target_of_ranks_changes_the_costlier_routes_alone() -> None:
    qualities = np.array([[0.5, 0.5, 0.5], [0.0, 0.1, 1.0], [0.2, 0.9, 0.3], [0.2, 0.9, 0.3]])
    found = target_qualities(qualities, "rank")
    assert found[:, 0].tolist() == qualities[:, 0].tolist()
    assert found[:, 2] - found[:, 0] == pytest.approx(ranked(qualities[:, 2] - qualities[:, 0]))
    assert target_qualities(qualities, "gain") is qualities


def test_target_that_ranks_better_is_chosen() -> None:
    weak, strong = np.tile([0.0, 1.0], 50), np.ones(100)
    qualities, source = np.stack([weak, strong], axis=1), np.zeros(100, np.int64)
    right = np.stack([np.zeros(100), strong - weak], axis=1)
    for gain, rank, best in ((right, -right, "gain"), (-right, right, "rank"), (right, right, "gain")):
        target, figures = best_target(source, {"gain": gain, "rank": rank}, qualities)
        assert target == best
        assert figures["gain"] == mean_apgr(source, gain, qualities)


def test_source_without_a_lead_has_no_part_in_the_choice() -> None:
    qualities = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    source, gains = np.array([0, 0, 1, 1]), np.array([[0, 1.0], [0, 0.0], [0, 1.0], [0, 0.0]])
    assert mean_apgr(source, gains, qualities) == mean_apgr(source[:2], gains[:2], qualities[:2])
    assert mean_apgr(source[2:], gains[2:], qualities[2:]) is None
