"""The verb, from labels to a probe that its cluster takes."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch.thresholds import read_thresholds
from stitch_server.build import load_stage
from stitch_server.model.probe import Probe
from stitch_server.worker.model_runner import ModelRunner
from stitch_training import probe_calibrate_command as calibrate_command
from stitch_training import probe_command as command
from stitch_training.probe import cheapest_first
from tests.support.in_process import ChainInProcess
from tests.support.tiny_cluster import write_tiny_cluster

CPU = torch.device("cpu")


def write_labels(path: Path, rows: int = 80, **names: str) -> Path:
    """Prompts of two kinds of letters; the strong route helps with one of them."""
    drawn = random.Random(0)
    lines = []
    for _ in range(rows):
        hard = drawn.random() < 0.5
        text = "".join(drawn.choices("xyz" if hard else "abc", k=12))
        qualities = {names.get("weak", "weak"): 0.0 if hard else 1.0, names.get("strong", "strong"): 1.0}
        lines.append(json.dumps({"prompt": text, "routes": qualities}))
    path.write_text("\n".join(lines))
    return path


def called(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    return write_tiny_cluster(tmp_path)


def test_labels_become_a_probe_that_the_shard_loads(cluster_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cluster_file.parent
    out, labels = folder / "probe.safetensors", write_labels(folder / "labels.jsonl")
    called(cluster_file, "--data", labels, "--out", out, "--tokens", 10, "--budget", 0.3)
    probe, report = Probe.load(out, CPU), json.loads(out.with_suffix(".json").read_text())
    assert (probe.binding.layer, probe.binding.tokens, probe.binding.routes) == (3, 10, ("weak", "strong"))
    (ranked,) = report["unseen"]["labels"].values()
    # Letters differ, so even random layers tell them apart.
    assert ranked["router"]["apgr"]["value"] > 0.7 > ranked["prompt length"]["apgr"]["value"]
    assert report["probe"] == probe.fingerprint
    assert probe.training["data"][0]["rows"] == 80
    assert probe.training["shares"][1] == pytest.approx(0.3, abs=0.05)
    assert "weak → strong" in capsys.readouterr().out
    fields = json.loads(cluster_file.read_text())
    fields["gateway"]["probe"] = "probe.safetensors"
    cluster_file.write_text(json.dumps(fields))
    cluster = load_cluster(str(cluster_file))
    loaded = load_stage(cluster, cluster.shard("bottom-0"), CPU).probe
    assert loaded is not None
    assert loaded.fingerprint == probe.fingerprint
    assert load_stage(cluster, cluster.shard("top-0"), CPU).probe is None


def test_names_in_the_file_stand_for_routes(cluster_file: Path) -> None:
    folder = cluster_file.parent
    labels = write_labels(folder / "labels.jsonl", weak="small", strong="large")
    out = folder / "probe.safetensors"
    called(cluster_file, "--data", labels, "--out", out, "--rename", "small=weak", "large=strong", "--tokens", 4)
    assert out.is_file()


def test_the_same_labels_make_the_same_bytes(cluster_file: Path) -> None:
    folder = cluster_file.parent
    labels = write_labels(folder / "labels.jsonl")
    outs = [folder / "a.safetensors", folder / "b.safetensors"]
    for out in outs:
        called(cluster_file, "--data", labels, "--out", out, "--tokens", 6, "--chat")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert Probe.load(outs[0], CPU).training["chat"] is True


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--tokens", 0], "tokens"),
        (["--tokens", 4096], "tokens"),
        (["--folds", 1], "folds"),
        (["--budget", 2], "budget"),
        (["--rename", "weak"], "rename"),
    ],
)
def test_a_flag_beyond_its_limits_is_named(flags: list[Any], field: str, cluster_file: Path) -> None:
    labels = write_labels(cluster_file.parent / "labels.jsonl")
    with pytest.raises(InvalidRequest, match=f"^{field} "):
        called(cluster_file, "--data", labels, "--out", cluster_file.parent / "p.safetensors", *flags)


def test_routes_are_ordered_by_what_they_read(cluster_file: Path) -> None:
    assert cheapest_first(load_cluster(str(cluster_file))) == ("weak", "strong")


class TestCalibration:
    @pytest.fixture
    def taught(self, cluster_file: Path) -> Path:
        labels, out = write_labels(cluster_file.parent / "labels.jsonl"), cluster_file.parent / "probe.safetensors"
        called(cluster_file, "--data", labels, "--out", out, "--tokens", 10)
        return cluster_file

    @staticmethod
    def calibrated(cluster_file: Path, budget: float) -> Path:
        folder, out = cluster_file.parent, cluster_file.parent / "thresholds.json"
        parser = argparse.ArgumentParser()
        calibrate_command.add_arguments(parser)
        given = [cluster_file, "--probe", folder / "probe.safetensors", "--data", folder / "labels.jsonl"]
        calibrate_command.run(parser.parse_args([*map(str, given), "--budget", str(budget), "--out", str(out)]))
        return out

    def test_thresholds_keep_the_budget_and_reach_the_shard(
        self, taught: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        thresholds = self.calibrated(taught, 0.25)
        assert "strong 25.0%" in capsys.readouterr().out
        fields = json.loads(taught.read_text())
        fields["gateway"] |= {"probe": "probe.safetensors", "probe_thresholds": thresholds.name}
        taught.write_text(json.dumps(fields))
        chain = ChainInProcess(load_cluster(str(taught)))
        runner = chain.shards["bottom-0"].engine._runner
        assert isinstance(runner, ModelRunner)
        assert runner.probe is not None
        decision = runner.probe.decide(torch.randn(10, 48), ("weak", "strong"))
        assert decision.thresholds == read_thresholds(thresholds).thresholds

    def test_thresholds_of_another_probe_are_refused(self, taught: Path) -> None:
        thresholds = self.calibrated(taught, 0.25)
        named = json.loads(thresholds.read_text()) | {"router": "another"}
        thresholds.write_text(json.dumps(named))
        fields = json.loads(taught.read_text())
        fields["gateway"] |= {"probe": "probe.safetensors", "probe_thresholds": thresholds.name}
        taught.write_text(json.dumps(fields))
        with pytest.raises(InvalidRequest, match="another"):
            ChainInProcess(load_cluster(str(taught)))

    def test_a_budget_beyond_its_limits_is_named(self, taught: Path) -> None:
        with pytest.raises(InvalidRequest, match=r"^budget "):
            self.calibrated(taught, 1.5)
