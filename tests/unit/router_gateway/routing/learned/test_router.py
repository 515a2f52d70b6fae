"""Tests of the learned router: its routes, scores and reasons, for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, save_router
from router_gateway.routing.learned.router import LearnedRouter, open_learned_router
from router_gateway.routing.router import REASON_KINDS, FallbackRouter, Query
from stitch.errors import InvalidRequest
from stitch.thresholds import FixedThresholds
from tests.support.word_model import word_model

ROUTES = ("weak", "strong")


def test_gain_above_threshold_decides_for_strong_route(artifact: RouterArtifact) -> None:
    decision = LearnedRouter(artifact).decide(Query(("prove",), ROUTES))
    assert (decision.route, decision.reason, decision.kind) == ("strong", "gain 0.50 > 0.10", "gain")


def test_gain_below_threshold_decides_for_weak_route(artifact: RouterArtifact) -> None:
    decision = LearnedRouter(artifact).decide(Query(("hello",), ROUTES))
    assert (decision.route, decision.reason) == ("weak", "gain -0.25 ≤ 0.10")


@pytest.mark.parametrize(("text", "score"), [("hello", 0.0), ("", 0.33), ("prove", 1.0)])
def test_score_is_the_share_of_training_texts_with_smaller_gain(
    artifact: RouterArtifact, text: str, score: float
) -> None:
    assert LearnedRouter(artifact).decide(Query((text,), ROUTES)).score == pytest.approx(score, abs=0.02)


@pytest.mark.parametrize(
    ("threshold", "pressure", "route"),
    [(0.3, 0.0, "strong"), (0.3, 0.5, "weak"), (-0.2, 0.0, "strong"), (-0.2, 0.9, "strong")],
)
def test_thresholds_rise_with_the_pressure(
    artifact: RouterArtifact, threshold: float, pressure: float, route: str
) -> None:
    router = LearnedRouter(artifact, FixedThresholds((threshold,)))
    assert router.decide(Query(("prove",), ROUTES, pressure)).route == route


def test_follow_up_is_decided_with_earlier_turns(artifact: RouterArtifact) -> None:
    router = LearnedRouter(artifact)
    assert router.decide(Query(("commit it",), ROUTES)).route == "weak"
    assert router.decide(Query(("prove", "commit it"), ROUTES)).route == "strong"


def test_three_routes_take_the_one_that_exceeds_its_threshold_most(artifact: RouterArtifact) -> None:
    model = word_model({"prove": 0.5, "sum": 0.2}, ("small", "middle", "large"))
    ladder = RouterArtifact(model, (0.1, 0.45), artifact.gain_percentiles, {}, fingerprint_of(model))
    decisions = [LearnedRouter(ladder).decide(Query((text,), model.routes)) for text in ("x", "sum", "prove")]
    assert [decision.route for decision in decisions] == ["small", "middle", "large"]
    assert [decision.reason for decision in decisions] == [
        "gain 0.00 ≤ 0.10",
        "gain 0.20 > 0.10",
        "gain 1.00 > 0.45",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x01\x02",
        "😀" * 1_000,
        "中文没有空格的一个句子",
        "שלום עולם",
        "prove " * 20_000,
        "9" * 100_000,
        "\ud800",
        "﷽" * 500,
        "a\u0301" * 3_000,
    ],
)
def test_any_text_has_a_decision(artifact: RouterArtifact, text: str) -> None:
    decision = LearnedRouter(artifact).decide(Query((text,), ROUTES))
    assert decision.route in ROUTES
    assert 0 <= decision.score <= 1
    assert decision.kind in REASON_KINDS


def test_query_without_turns_has_a_decision(artifact: RouterArtifact) -> None:
    assert LearnedRouter(artifact).decide(Query((), ROUTES)).route == "weak"


def test_other_routes_raise_and_fallback_router_catches_it(artifact: RouterArtifact) -> None:
    query = Query(("hello",), ("small", "large"))
    with pytest.raises(InvalidRequest, match="trained for weak, strong"):
        LearnedRouter(artifact).decide(query)
    assert FallbackRouter(LearnedRouter(artifact)).decide(query).kind == "fallback"


def test_decision_uses_the_thresholds_of_its_source(artifact: RouterArtifact) -> None:
    router = LearnedRouter(artifact, FixedThresholds((0.6,)))
    assert router.decide(Query(("prove",), ROUTES)).route == "weak"


def test_score_uses_the_percentiles_of_the_calibration(artifact: RouterArtifact, tmp_path: Path) -> None:
    path, thresholds = tmp_path / "router.safetensors", tmp_path / "thresholds.json"
    save_router(artifact, path)
    # Nine of ten texts have a larger gain than "prove".
    percentiles = [0.0] * 10 + [0.75] * 91
    fields = {"routes": ROUTES, "thresholds": [0.6], "router": artifact.fingerprint, "budget": 0.1}
    thresholds.write_text(json.dumps({**fields, "gain_percentiles": percentiles}))
    router = open_learned_router(path, thresholds)
    assert router.decide(Query(("prove",), ROUTES)).score == pytest.approx(0.1, abs=0.01)
    assert router.calibration is not None
    assert router.calibration.budget == 0.1
    assert LearnedRouter(artifact).calibration is None


def test_decision_has_expected_quality_of_every_route(artifact: RouterArtifact) -> None:
    decision = LearnedRouter(artifact).decide(Query(("hello",), ROUTES))
    assert decision.qualities == (0.5, 0.25)


def test_open_learned_router_reads_artifact_and_thresholds(artifact: RouterArtifact, tmp_path: Path) -> None:
    path, thresholds = tmp_path / "router.safetensors", tmp_path / "thresholds.json"
    save_router(artifact, path)
    fields = {"routes": ROUTES, "thresholds": [0.6], "router": artifact.fingerprint, "budget": 0.1}
    thresholds.write_text(json.dumps(fields))
    assert open_learned_router(path).decide(Query(("prove",), ROUTES)).route == "strong"
    assert open_learned_router(path, thresholds).decide(Query(("prove",), ROUTES)).route == "weak"
    assert open_learned_router(path).routes == ROUTES
