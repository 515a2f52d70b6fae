"""train, calibrate and evaluate from their command lines, end to end on a small set."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType

import pytest

from router_gateway.routing.learned.artifact import load_router
from router_gateway.routing.learned.router import open_learned_router
from router_gateway.routing.router import Query
from stitch.errors import InvalidRequest
from stitch.thresholds import read_thresholds
from stitch_training import router_calibrate as calibrate
from stitch_training import router_evaluate as evaluate
from stitch_training import router_train as train
from tests.support.labelled_prompts import rows, write


def ran(verb: ModuleType, *flags: object) -> int:
    parser = ArgumentParser()
    verb.add_arguments(parser)
    status: int = verb.run(parser.parse_args([str(flag) for flag in flags]))
    return status


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sets of labels, and a router that was trained on the first."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "seen.jsonl", rows(160, seed=0))
    write(folder / "unseen.jsonl", rows(160, seed=1))
    assert ran(train, "--data", folder / "seen.jsonl", "--out", folder / "router.safetensors", "--folds", 2) == 0
    return folder


def test_training_says_what_it_was_and_on_what(folder: Path) -> None:
    artifact = load_router(folder / "router.safetensors")
    [data] = artifact.training["data"]
    assert (data["name"], data["rows"], data["skipped"]) == ("seen", 160, 0)
    assert artifact.training["unseen"]["seen"]["weak → strong"]["apgr"] > 0.6
    assert list(artifact.gain_percentiles) == sorted(artifact.gain_percentiles)


def test_training_twice_gives_the_same_router(folder: Path) -> None:
    again = folder / "again.safetensors"
    assert ran(train, "--data", folder / "seen.jsonl", "--out", again, "--folds", 2) == 0
    assert load_router(again).fingerprint == load_router(folder / "router.safetensors").fingerprint


def test_a_trained_router_sends_hard_prompts_to_the_strong_route(folder: Path) -> None:
    router = open_learned_router(folder / "router.safetensors")
    assert router.decide(Query(("prove the theorem and the integral",), ("weak", "strong"))).route == "strong"
    assert router.decide(Query(("hello what music for breakfast",), ("weak", "strong"))).route == "weak"


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_calibration_keeps_a_budget(folder: Path, budget: float, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "thresholds.json"
    flags = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl", "--out", out)
    assert ran(calibrate, *flags, "--budget", budget) == 0
    router = open_learned_router(folder / "router.safetensors", out)
    taken = [router.decide(Query((row["prompt"],), ("weak", "strong"))).route for row in rows(160, seed=1)]
    assert taken.count("strong") / 160 == pytest.approx(budget, abs=0.01)
    assert f"of a budget of {budget:.3f}" in capsys.readouterr().err
    assert not list(folder.glob(".*"))


def test_a_cost_in_parameters_is_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl")
    assert ran(calibrate, *flags, "--cost", 125, "--costs", "weak=100", "strong=200") == 0
    assert json.loads(capsys.readouterr().out)["budget"] == 0.25


def test_a_threshold_file_names_its_router(folder: Path) -> None:
    out = folder / "named.json"
    flags = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl", "--out", out)
    assert ran(calibrate, *flags, "--budget", 0.3) == 0
    assert read_thresholds(out).router == load_router(folder / "router.safetensors").fingerprint


def test_a_threshold_file_says_what_texts_and_costs_it_comes_from(folder: Path) -> None:
    out = folder / "whole.json"
    flags = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl", "--out", out)
    assert ran(calibrate, *flags, "--budget", 0.3) == 0
    found = read_thresholds(out)
    assert found.costs == (0.0, 1.0)
    assert found.gain_percentiles is not None
    # Three of ten texts gain more than the threshold of that budget.
    assert found.gain_percentiles[69] <= found.thresholds[0] <= found.gain_percentiles[71]


def test_evaluation_prints_draws_and_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl")
    assert ran(evaluate, *flags, "--plot", folder / "curves.png", "--json", folder / "report.json") == 0
    printed = capsys.readouterr()
    for word in ("router", "prompt length", "random", "oracle", "CPT(80 %)", "own thresholds"):
        assert word in printed.out
    assert printed.err == ""
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text())["data"]["unseen"]
    assert report["seen_in_training"] is False
    assert report["pairs"]["weak → strong"]["router"]["apgr"]["value"] > 0.6
    assert sum(report["at_thresholds"]["shares"].values()) == pytest.approx(1)


def test_evaluation_on_the_training_file_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(evaluate, "--router", folder / "router.safetensors", "--data", folder / "seen.jsonl") == 0
    assert "trained on this very file" in capsys.readouterr().err


def test_several_files_have_a_plot_each(folder: Path) -> None:
    data = (folder / "seen.jsonl", folder / "unseen.jsonl")
    assert ran(evaluate, "--router", folder / "router.safetensors", "--data", *data, "--plot", folder / "all.png") == 0
    assert (folder / "all-seen.png").exists()
    assert (folder / "all-unseen.png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--budget", "2"), "budget is 2.0"),
        (("--cost", "5"), "--cost needs the cost of every route"),
        (("--cost", "5", "--costs", "weak=1"), "one for strong"),
        (("--cost", "5", "--costs", "weak=1", "strong=2"), "cost from 1 to 2"),
        (("--budget", "0.5", "--costs", "weak"), "NAME=VALUE"),
        (("--budget", "0.5", "--costs", "weak=much"), "NAME=NUMBER"),
    ],
)
def test_a_target_that_is_none_is_refused(
    folder: Path, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--router", folder / "router.safetensors", "--data", folder / "unseen.jsonl")
    assert ran(calibrate, *given, *flags) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(evaluate, "--router", folder / "router.safetensors", "--data", folder / "absent.jsonl") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("router-gateway: data is ")
    assert "absent.jsonl" in line


@pytest.mark.parametrize(
    ("routes", "folds", "field"),
    [(("one",), 5, "routes"), (("a", "a"), 5, "routes"), (("a", ""), 5, "routes"), (("a", "b"), 1, "folds")],
)
def test_what_can_not_be_trained_is_refused(routes: tuple[str, ...], folds: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        train.check(routes, folds)
    assert refused.value.field == field
