"""Judgements behind the gateway's interface: routes, scores, reasons, and any text at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_gateway.routing.fallback import FallbackRouter
from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, save_router
from router_gateway.routing.learned.router import LearnedRouter, open_text_router
from router_gateway.routing.router import REASON_KINDS, Query
from stitch.errors import InvalidRequest
from stitch.thresholds import FixedThresholds
from tests.support.word_model import word_model

ROUTES = ("weak", "strong")


def test_a_gain_above_the_threshold_takes_the_strong_route_and_says_why(artefact: RouterArtifact) -> None:
    decision = LearnedRouter(artefact).judge(Query(("prove",), ROUTES))
    assert (decision.route, decision.reason, decision.kind) == ("strong", "gain 0.50 > 0.10", "gain")


def test_a_gain_below_the_threshold_takes_the_weak_route_and_says_why(artefact: RouterArtifact) -> None:
    decision = LearnedRouter(artefact).judge(Query(("hello",), ROUTES))
    assert (decision.route, decision.reason) == ("weak", "gain -0.25 ≤ 0.10")


@pytest.mark.parametrize(("text", "score"), [("hello", 0.0), ("", 0.33), ("prove", 1.0)])
def test_a_score_is_the_share_of_training_texts_that_ask_less(
    artefact: RouterArtifact, text: str, score: float
) -> None:
    assert LearnedRouter(artefact).judge(Query((text,), ROUTES)).score == pytest.approx(score, abs=0.02)


def test_a_follow_up_is_judged_with_what_came_before(artefact: RouterArtifact) -> None:
    router = LearnedRouter(artefact)
    assert router.judge(Query(("commit it",), ROUTES)).route == "weak"
    assert router.judge(Query(("prove", "commit it"), ROUTES)).route == "strong"


def test_a_ladder_of_three_is_climbed_only_as_far_as_it_pays(artefact: RouterArtifact) -> None:
    model = word_model({"prove": 0.5, "sum": 0.2}, ("small", "middle", "large"))
    ladder = RouterArtifact(model, (0.1, 0.45), artefact.gain_percentiles, {}, fingerprint_of(model))
    decisions = [LearnedRouter(ladder).judge(Query((text,), model.routes)) for text in ("x", "sum", "prove")]
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
def test_any_text_has_a_judgement(artefact: RouterArtifact, text: str) -> None:
    decision = LearnedRouter(artefact).judge(Query((text,), ROUTES))
    assert decision.route in ROUTES
    assert 0 <= decision.score <= 1
    assert decision.kind in REASON_KINDS


def test_no_turns_have_a_judgement_too(artefact: RouterArtifact) -> None:
    assert LearnedRouter(artefact).judge(Query((), ROUTES)).route == "weak"


def test_routes_of_another_cluster_are_an_error_that_the_gateway_survives(artefact: RouterArtifact) -> None:
    query = Query(("hello",), ("small", "large"))
    with pytest.raises(InvalidRequest, match="trained for weak, strong"):
        LearnedRouter(artefact).judge(query)
    assert FallbackRouter(LearnedRouter(artefact)).judge(query).kind == "fallback"


def test_other_thresholds_are_asked_for_at_every_judgement(artefact: RouterArtifact) -> None:
    router = LearnedRouter(artefact, FixedThresholds((0.6,)))
    assert router.judge(Query(("prove",), ROUTES)).route == "weak"


def test_a_score_is_the_share_of_the_calibration_s_texts_where_there_is_one(
    artefact: RouterArtifact, tmp_path: Path
) -> None:
    path, thresholds = tmp_path / "router.safetensors", tmp_path / "thresholds.json"
    save_router(artefact, path)
    # Texts of which nine of ten ask for more than "prove" does.
    percentiles = [0.0] * 10 + [0.75] * 91
    fields = {"routes": ROUTES, "thresholds": [0.6], "router": artefact.fingerprint, "budget": 0.1}
    thresholds.write_text(json.dumps({**fields, "gain_percentiles": percentiles}))
    router = open_text_router(path, thresholds)
    assert router.judge(Query(("prove",), ROUTES)).score == pytest.approx(0.1, abs=0.01)
    assert router.calibration is not None
    assert router.calibration.budget == 0.1
    assert LearnedRouter(artefact).calibration is None


def test_a_judgement_says_what_every_route_is_expected_to_be_worth(artefact: RouterArtifact) -> None:
    decision = LearnedRouter(artefact).judge(Query(("hello",), ROUTES))
    assert decision.qualities == (0.5, 0.25)


def test_a_router_opens_from_its_files(artefact: RouterArtifact, tmp_path: Path) -> None:
    path, thresholds = tmp_path / "router.safetensors", tmp_path / "thresholds.json"
    save_router(artefact, path)
    fields = {"routes": ROUTES, "thresholds": [0.6], "router": artefact.fingerprint, "budget": 0.1}
    thresholds.write_text(json.dumps(fields))
    assert open_text_router(path).judge(Query(("prove",), ROUTES)).route == "strong"
    assert open_text_router(path, thresholds).judge(Query(("prove",), ROUTES)).route == "weak"
    assert open_text_router(path).routes == ROUTES
