"""From gains to rungs."""

from __future__ import annotations

import numpy as np
import pytest

from router_gateway.routing.text.choice import chosen


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
