"""A verdict is the probe's gains against the thresholds of the moment."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from stitch.thresholds import FixedThresholds, Thresholds
from stitch_server.model.probe import Probe, ProbeBinding
from stitch_server.worker.route_probe import RouteProbe, fallback

ROUTES = ("weak", "strong")


def new_judge(gain: float, threshold: float, fallback_route: str | None = None) -> RouteProbe:
    """Every prompt has the same gain."""
    probe = Probe(
        weight=torch.zeros(1, 2),
        bias=torch.tensor([gain]),
        binding=ProbeBinding("id", "revision", 2, 1, 3, ROUTES, "t"),
        thresholds=(9.0,),
        percentiles=tuple(step / 100 for step in range(101)),
    )
    return RouteProbe(probe, FixedThresholds((threshold,)), fallback_route)


STATES = torch.ones(5, 2)


def test_a_gain_above_the_threshold_goes_on() -> None:
    decision = new_judge(0.75, 0.5).judge(STATES, ROUTES)
    assert (decision.route, decision.failure) == ("strong", "")
    assert (decision.gains, decision.thresholds) == ((0.0, 0.75), (0.5,))
    assert decision.score == 75 / 101


def test_the_threshold_itself_does_not() -> None:
    assert new_judge(0.5, 0.5).judge(STATES, ROUTES).route == "weak"


def test_only_the_window_is_read() -> None:
    judge = new_judge(0.75, 0.5)
    states = torch.cat([torch.ones(judge.tokens, 2), torch.full((4, 2), float("nan"))])
    assert judge.judge(states, ROUTES).failure == ""


def test_what_is_not_finite_takes_the_fallback() -> None:
    states = torch.full((3, 2), float("nan"))
    dearest, named = (new_judge(0.0, 0.5, route).judge(states, ROUTES) for route in (None, "weak"))
    assert (dearest.route, dearest.failure) == ("strong", "the probe's gains are not finite")
    assert named.route == "weak"


def test_a_route_that_is_no_candidate_gives_way_to_the_dearest_that_is() -> None:
    candidates = ("weak", "middle")
    decision = new_judge(0.75, 0.5).judge(STATES, candidates)
    assert (decision.route, decision.preferred, decision.gains) == ("middle", "strong", (0.0, 0.75))
    assert new_judge(0.25, 0.5).judge(STATES, candidates).preferred == ""
    unread = new_judge(0.0, 0.5, "strong").judge(torch.full((3, 2), float("nan")), candidates)
    assert (unread.route, unread.preferred) == ("middle", "strong")
    assert fallback(None, candidates, "why").route == "middle"


def test_the_score_is_the_share_of_the_calibration_s_prompts_where_there_is_one() -> None:
    judge = new_judge(0.75, 0.5)
    halves = tuple(step / 200 for step in range(101))
    calibration = Thresholds(routes=ROUTES, thresholds=(0.5,), router="r", budget=0.3, gain_percentiles=halves)
    judge._thresholds = Mock(current=lambda: (0.5,), calibration=calibration)
    assert judge.judge(STATES, ROUTES).score == 1.0
