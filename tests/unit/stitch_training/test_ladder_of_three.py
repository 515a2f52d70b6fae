"""More than two routes, from labels to a judgement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from router_gateway.routing.learned.artifact import load_router
from router_gateway.routing.learned.router import open_learned_router
from router_gateway.routing.router import Query
from stitch_training.router_calibrate import calibrate
from stitch_training.router_evaluate import evaluate
from stitch_training.router_train import train
from tests.support.labelled_prompts import rows, write

ROUTES = ("small", "middle", "large")
COSTS = ["small=100", "middle=150", "large=300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    data = write(folder / "seen.jsonl", rows(240, routes=ROUTES))
    write(folder / "unseen.jsonl", rows(240, seed=1, routes=ROUTES))
    train([data], folder / "router.safetensors", ROUTES, [], folds=2)
    return folder


def test_there_is_a_threshold_for_every_rung_but_the_cheapest(folder: Path) -> None:
    artifact = load_router(folder / "router.safetensors")
    assert artifact.model.routes == ROUTES
    assert len(artifact.thresholds) == 2
    assert set(artifact.training["unseen"]["seen"]) == {"small → middle", "small → large"}


@pytest.mark.parametrize("cost", [130.0, 200.0])
def test_a_mean_cost_is_kept_to(folder: Path, cost: float) -> None:
    path, out = folder / "router.safetensors", folder / "thresholds.json"
    calibrate(path, [folder / "unseen.jsonl"], None, cost, COSTS, out)
    router = open_learned_router(path, out)
    taken = [router.decide(Query((row["prompt"],), ROUTES)).route for row in rows(240, seed=1, routes=ROUTES)]
    price = {"small": 100, "middle": 150, "large": 300}
    assert np.mean([price[route] for route in taken]) == pytest.approx(cost, abs=5)


def test_every_rung_is_measured_against_the_cheapest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "report.json"
    evaluate(folder / "router.safetensors", [folder / "unseen.jsonl"], [], None, out)
    report = json.loads(out.read_text())["data"]["unseen"]
    assert set(report["pairs"]) == {"small → middle", "small → large"}
    assert set(report["at_thresholds"]["shares"]) == set(ROUTES)
    assert "small → large, 240 rows" in capsys.readouterr().out
