"""The learned router: its fit, and the verbs that train, calibrate and evaluate it, for two routes and three."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from router_gateway.routing.learned.artifact import load_router
from router_gateway.routing.learned.model import standardized
from router_gateway.routing.learned.router import open_learned_router
from router_gateway.routing.router import Query
from stitch.errors import InvalidRequest
from stitch.thresholds import read_thresholds
from stitch_training.calibration import calibrate_router
from stitch_training.cli import main, parse_costs
from stitch_training.labels import LabelledSet, read_labels
from stitch_training.router import (
    MIN_TASK_ROWS,
    Examples,
    check_training,
    common_topics,
    cross_validated_gains,
    evaluate,
    fit,
    gather,
    nested_gains,
    train,
)
from stitch_training.router_classifier import train_topics
from stitch_training.router_features import MIN_TEXTS, extract, measure_weighting, shared_buckets
from tests.support.labelled_prompts import rows, write


def labelled(
    folder: Path, name: str = "made", seed: int = 0, routes: tuple[str, ...] = ("weak", "strong")
) -> LabelledSet:
    return read_labels(write(folder / f"{name}.jsonl", rows(seed=seed, routes=routes)), routes)


@pytest.fixture
def made(tmp_path: Path) -> LabelledSet:
    return labelled(tmp_path)


def test_words_of_a_single_text_are_left_out() -> None:
    texts = extract(["common rare", "common other"])
    [kept] = shared_buckets(texts).tolist()
    assert MIN_TEXTS == 2
    assert (texts.frequencies[:, [kept]].toarray() == 1).all()


def test_weighted_words_have_length_one_and_surface_is_standardized() -> None:
    texts = extract(["a b a", "a b", "b a c and 3 more", ""])
    weighting = measure_weighting(texts, shared_buckets(texts))
    lengths = np.sqrt(weighting.words(texts).power(2).sum(axis=1))
    assert lengths.tolist() == pytest.approx([1, 1, 1, 0])
    assert weighting.surface(texts).mean(axis=0) == pytest.approx(0, abs=1e-5)


def test_weighting_equals_the_model_s(made: LabelledSet) -> None:
    examples = gather([made])
    model = fit(examples)
    weighting = measure_weighting(examples.texts, model.buckets)
    words = weighting.words(examples.texts).toarray()
    for row in (0, 7, 31):
        by_hand = words[row] @ (model.weights.astype(np.float32) / weighting.idf[:, None])
        assert model._words(made.prompts[row]) == pytest.approx(by_hand, abs=1e-3)
        surface = standardized(examples.texts.surface[row], model.surface_mean[1], model.surface_scale[1])
        assert surface == pytest.approx(weighting.surface(examples.texts)[row], abs=1e-5)


def test_unseen_hard_prompts_gain_more(made: LabelledSet) -> None:
    model = fit(gather([made]))
    hard, easy = model.gains("derive the theorem of it"), model.gains("hello and music for holiday")
    assert hard[1] > easy[1] + 0.2
    assert hard[0] == easy[0] == 0


def test_cross_validated_gains_rank_hard_prompts_first(made: LabelledSet) -> None:
    done: list[int] = []
    by_target = cross_validated_gains(gather([made]), 3, progress=done.append)
    hard = np.array([topic.endswith("hard") for topic in made.topics])
    assert list(by_target) == ["gain", "rank"]
    for gains in by_target.values():
        assert np.median(gains[hard, 1]) > np.quantile(gains[~hard, 1], 0.9)
    assert done == [1, 2, 3]


def test_cross_validated_gain_is_independent_of_its_own_label(made: LabelledSet) -> None:
    before, _ = nested_gains(gather([made]), 3, seed=0)
    others = gather([made])
    flipped = Examples(**{**vars(others), "qualities": others.qualities.copy()})
    flipped.qualities[5] = 1 - flipped.qualities[5]
    # The row's own fold was fitted without it, and its target was chosen without it.
    assert nested_gains(flipped, 3, seed=0)[0][5].tolist() == before[5].tolist()


def test_disagreeing_sets_keep_their_own_experts(tmp_path: Path) -> None:
    first = labelled(tmp_path, "first")
    flipped = [
        {
            **row,
            "prompt": f"Q: {row['prompt']}\nA:",
            "routes": {"weak": row["routes"]["strong"], "strong": row["routes"]["weak"]},
        }
        for row in rows(seed=1)
    ]
    second = read_labels(write(tmp_path / "second.jsonl", flipped))
    model = fit(gather([first, second]))
    assert model.sources == ("first", "second")
    assert model.gains("prove the theorem 3?")[1] > 0.2
    assert model.gains("Q: prove the theorem 3?\nA:")[1] < -0.2


def test_gains_of_three_routes_rise_with_their_cost(tmp_path: Path) -> None:
    routes = ("small", "middle", "large")
    found = labelled(tmp_path, routes=routes)
    gains = fit(gather([found])).gains("prove the matrix theorem")
    assert 0 < gains[1] < gains[2]


def test_files_with_one_name_are_refused(made: LabelledSet) -> None:
    with pytest.raises(InvalidRequest, match="its own name"):
        gather([made, made])


def test_rare_tasks_are_replaced_by_their_source() -> None:
    topics = ["set/often"] * MIN_TASK_ROWS + ["set/once"]
    assert common_topics(topics) == ["set/often"] * MIN_TASK_ROWS + ["set"]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_classifier_separates_classes_in_unseen_texts(classes: int) -> None:
    words = ["cat", "dog", "bird"][:classes]
    labels = [words[row % classes] for row in range(60)]
    texts = extract([f"the {label} number {row} runs" for row, label in enumerate(labels)])
    weighting = measure_weighting(texts, shared_buckets(texts))
    classifier, posterior = train_topics(weighting.words(texts), weighting.surface(texts), labels)
    assert posterior.sum(axis=1) == pytest.approx(1)
    assert [classifier.classes[best] for best in posterior.argmax(axis=1)] == labels
    logits = weighting.words(texts) @ classifier.word_weights + classifier.bias
    assert [classifier.classes[best] for best in np.asarray(logits).argmax(axis=1)] == labels


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with two sets of labels, and a router that was trained on the first."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "training.jsonl", rows(160, seed=0))
    write(folder / "unseen.jsonl", rows(160, seed=1))
    assert (
        run(
            "router", "train", "--data", folder / "training.jsonl", "--out", folder / "router.safetensors", "--folds", 2
        )
        == 0
    )
    return folder


def test_artifact_records_its_data_and_figures(trained: Path) -> None:
    artifact = load_router(trained / "router.safetensors")
    [data] = artifact.training["data"]
    assert (data["name"], data["rows"], data["skipped"]) == ("training", 160, 0)
    assert artifact.training["unseen"]["training"]["weak → strong"]["apgr"] > 0.6
    by_target = artifact.training["mean_apgr"]
    assert set(by_target) == {"gain", "rank"}
    assert by_target[artifact.training["target"]] == max(by_target.values())
    assert list(artifact.gain_percentiles) == sorted(artifact.gain_percentiles)


def test_training_twice_gives_the_same_router(trained: Path) -> None:
    again = trained / "again.safetensors"
    assert run("router", "train", "--data", trained / "training.jsonl", "--out", again, "--folds", 2) == 0
    assert load_router(again).fingerprint == load_router(trained / "router.safetensors").fingerprint


def test_a_trained_router_sends_hard_prompts_to_the_strong_route(trained: Path) -> None:
    router = open_learned_router(trained / "router.safetensors")
    assert router.decide(Query(("prove the theorem and the integral",), ("weak", "strong"))).route == "strong"
    assert router.decide(Query(("hello what music for breakfast",), ("weak", "strong"))).route == "weak"


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_calibrate_keeps_the_budget(trained: Path, budget: float, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "thresholds.json"
    flags = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl", "--out", out)
    assert run("calibrate", *flags, "--budget", budget) == 0
    router = open_learned_router(trained / "router.safetensors", out)
    routes = [router.decide(Query((row["prompt"],), ("weak", "strong"))).route for row in rows(160, seed=1)]
    assert routes.count("strong") / 160 == pytest.approx(budget, abs=0.01)
    assert f"of a budget of {budget:.3f}" in capsys.readouterr().err
    assert not list(trained.glob(".*"))


def test_calibrate_accepts_a_cost_in_parameters(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl")
    assert run("calibrate", *flags, "--cost", 125, "--costs", "weak=100", "strong=200") == 0
    assert json.loads(capsys.readouterr().out)["budget"] == 0.25


def test_threshold_file_names_its_router(trained: Path) -> None:
    out = trained / "named.json"
    flags = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl", "--out", out)
    assert run("calibrate", *flags, "--budget", 0.3) == 0
    assert read_thresholds(out).router == load_router(trained / "router.safetensors").fingerprint


def test_threshold_file_has_costs_and_gain_percentiles(trained: Path) -> None:
    out = trained / "whole.json"
    flags = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl", "--out", out)
    assert run("calibrate", *flags, "--budget", 0.3) == 0
    found = read_thresholds(out)
    assert found.costs == (0.0, 1.0)
    assert found.gain_percentiles is not None
    # Three of ten texts gain more than the threshold of that budget.
    assert found.gain_percentiles[69] <= found.thresholds[0] <= found.gain_percentiles[71]


def test_router_evaluate_prints_plots_and_writes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl")
    assert run("router", "evaluate", *flags, "--plot", trained / "curves.png", "--json", trained / "report.json") == 0
    printed = capsys.readouterr()
    for word in ("router", "prompt length", "random", "oracle", "CPT(80 %)", "own thresholds"):
        assert word in printed.out
    assert printed.err == ""
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((trained / "report.json").read_text())["data"]["unseen"]
    assert report["seen_in_training"] is False
    assert report["pairs"]["weak → strong"]["router"]["apgr"]["value"] > 0.6
    assert sum(report["at_thresholds"]["shares"].values()) == pytest.approx(1)


def test_router_evaluate_with_folds_measures_each_file_and_all(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, data = trained / "folds.json", (trained / "training.jsonl", trained / "unseen.jsonl")
    assert run("router", "evaluate", "--folds", 2, "--data", *data, "--json", report, "--plot", trained / "f.png") == 0
    printed = capsys.readouterr().out
    assert "all files, weak → strong, rows unseen:" in printed
    assert "PGR at 50 %" in printed
    found = json.loads(report.read_text())
    assert set(found["unseen"]) == {"training", "unseen", "all files"}
    assert set(found["targets"]) <= {"gain", "rank"}
    everything = found["unseen"]["all files"]["weak → strong"]
    assert everything["router"]["pgr_50"]["value"] > 0.6
    assert everything["lead"]["value"] == pytest.approx(
        everything["router"]["apgr"]["value"] - everything["prompt length"]["apgr"]["value"]
    )
    assert (trained / "f-all-files.png").exists()


def test_router_evaluate_repeats_with_more_draws_of_the_folds(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, reports = trained / "unseen.jsonl", [trained / f"{name}.json" for name in ("both", "first", "second")]
    for report, more in zip(reports, (("--draws", 2), (), ("--seed", 1)), strict=True):
        assert run("router", "evaluate", "--folds", 2, "--data", data, "--json", report, *more) == 0
    both, first, second = (json.loads(report.read_text()) for report in reports)
    assert both["draws"] == [*first["draws"], *second["draws"]]
    assert first["draws"] != second["draws"]
    assert both["unseen"] == first["unseen"]
    apgr = [draw["unseen"]["weak → strong"]["apgr"] for draw in both["draws"]]
    assert f"unseen, weak → strong: APGR {np.mean(apgr):.3f} ({min(apgr):.3f} to " in capsys.readouterr().out
    assert run("router", "evaluate", "--folds", 2, "--data", data, "--draws", 0) == 2


def test_router_evaluate_needs_an_artifact_or_folds(trained: Path) -> None:
    with pytest.raises(SystemExit):
        run("router", "evaluate", "--data", trained / "unseen.jsonl")


def test_router_evaluate_warns_on_training_data(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("router", "evaluate", "--router", trained / "router.safetensors", "--data", trained / "training.jsonl") == 0
    )
    assert "trained on this very file" in capsys.readouterr().err


def test_router_evaluate_plots_each_file(trained: Path) -> None:
    data = (trained / "training.jsonl", trained / "unseen.jsonl")
    assert (
        run(
            "router",
            "evaluate",
            "--router",
            trained / "router.safetensors",
            "--data",
            *data,
            "--plot",
            trained / "all.png",
        )
        == 0
    )
    assert (trained / "all-training.png").exists()
    assert (trained / "all-unseen.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "2"), "budget is 2.0"),
        (("--cost", "5"), "--cost needs the cost of every route"),
        (("--cost", "5", "--costs", "weak=1"), "one for strong"),
        (("--cost", "5", "--costs", "weak=1", "strong=2"), "cost from 1 to 2"),
        (("--budget", "0.5", "--costs", "weak"), "NAME=VALUE"),
        (("--budget", "0.5", "--costs", "weak=much"), "NAME=NUMBER"),
    ],
)
def test_invalid_calibration_target_is_refused(
    trained: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--router", trained / "router.safetensors", "--data", trained / "unseen.jsonl")
    assert run("calibrate", *given, *flags) == 2
    assert message in capsys.readouterr().err


def test_missing_file_is_refused_by_name(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("router", "evaluate", "--router", trained / "router.safetensors", "--data", trained / "absent.jsonl") == 2
    )
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("stitch-train: data is ")
    assert "absent.jsonl" in line


@pytest.mark.parametrize(
    ("routes", "folds", "field"),
    [(("one",), 5, "routes"), (("a", "a"), 5, "routes"), (("a", ""), 5, "routes"), (("a", "b"), 1, "folds")],
)
def test_invalid_routes_or_folds_are_refused(routes: tuple[str, ...], folds: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_training(routes, folds)
    assert refused.value.field == field


ROUTES = ("small", "middle", "large")
COSTS = ["small=100", "middle=150", "large=300"]


@pytest.fixture(scope="module")
def three_routes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    three_routes = tmp_path_factory.mktemp("three-routes")
    data = write(three_routes / "training.jsonl", rows(240, routes=ROUTES))
    write(three_routes / "unseen.jsonl", rows(240, seed=1, routes=ROUTES))
    train([data], three_routes / "router.safetensors", ROUTES, {}, count=2)
    return three_routes


def test_artifact_has_a_threshold_for_every_route_but_the_cheapest(three_routes: Path) -> None:
    artifact = load_router(three_routes / "router.safetensors")
    assert artifact.model.routes == ROUTES
    assert len(artifact.thresholds) == 2
    assert set(artifact.training["unseen"]["training"]) == {"small → middle", "small → large"}


@pytest.mark.parametrize("cost", [130.0, 200.0])
def test_calibrate_keeps_the_mean_cost_of_three_routes(three_routes: Path, cost: float) -> None:
    path, out = three_routes / "router.safetensors", three_routes / "thresholds.json"
    thresholds, _ = calibrate_router(path, [three_routes / "unseen.jsonl"], None, cost, parse_costs(COSTS))
    thresholds.write(out)
    router = open_learned_router(path, out)
    routes = [router.decide(Query((row["prompt"],), ROUTES)).route for row in rows(240, seed=1, routes=ROUTES)]
    price = {"small": 100, "middle": 150, "large": 300}
    assert np.mean([price[route] for route in routes]) == pytest.approx(cost, abs=5)


def test_evaluate_compares_every_route_with_the_cheapest(
    three_routes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = three_routes / "report.json"
    evaluate(three_routes / "router.safetensors", [three_routes / "unseen.jsonl"], {}, None, out)
    report = json.loads(out.read_text())["data"]["unseen"]
    assert set(report["pairs"]) == {"small → middle", "small → large"}
    assert set(report["at_thresholds"]["shares"]) == set(ROUTES)
    assert "small → large, 240 rows" in capsys.readouterr().out
