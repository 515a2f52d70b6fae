"""A verdict is the probe's gains against the thresholds of the moment."""

from __future__ import annotations

import torch

from stitch.routing.thresholds import FixedThresholds
from stitch_server.engine.judge import Judge
from stitch_server.model.probe import Probe, ProbeBinding

ROUTES = ("weak", "strong")


def new_judge(gain: float, threshold: float, fallback_route: str | None = None) -> Judge:
    """Every prompt has the same gain."""
    probe = Probe(
        weight=torch.zeros(1, 2),
        bias=torch.tensor([gain]),
        binding=ProbeBinding("id", "revision", 2, 1, 3, ROUTES, "t"),
        thresholds=(9.0,),
        percentiles=tuple(step / 100 for step in range(101)),
    )
    return Judge(probe, FixedThresholds((threshold,)), fallback_route)


STATES = torch.ones(5, 2)


def test_a_gain_above_the_threshold_goes_on() -> None:
    verdict = new_judge(0.75, 0.5).judge(STATES)
    assert (verdict.route, verdict.failure) == ("strong", "")
    assert (verdict.gains, verdict.thresholds) == ((0.0, 0.75), (0.5,))
    assert verdict.score == 75 / 101


def test_the_threshold_itself_does_not() -> None:
    assert new_judge(0.5, 0.5).judge(STATES).route == "weak"


def test_only_the_window_is_read() -> None:
    judge = new_judge(0.75, 0.5)
    states = torch.cat([torch.ones(judge.tokens, 2), torch.full((4, 2), float("nan"))])
    assert judge.judge(states).failure == ""


def test_what_is_not_finite_takes_the_fallback() -> None:
    states = torch.full((3, 2), float("nan"))
    dearest, named = new_judge(0.0, 0.5).judge(states), new_judge(0.0, 0.5, "weak").judge(states)
    assert (dearest.route, dearest.failure) == ("strong", "the probe's gains are not finite")
    assert named.route == "weak"
