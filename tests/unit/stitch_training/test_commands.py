"""The verbs over a tiny pair, from flags to files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from stitch.errors import Incompatible, InvalidRequest
from stitch_server.model.stitch import Stitch
from stitch_training import evaluate_command, sweep_command
from stitch_training import fit_command as command
from tests.support.tiny_fit import write_cluster, write_texts

MODULES = (command, sweep_command, evaluate_command)


def called(module: ModuleType, *arguments: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(argument) for argument in arguments]))


class Workbench:
    """A folder with a tiny cluster and two files of text."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cluster = folder, write_cluster(folder)
        self.data = [write_texts(folder / name, seed=seed) for seed, name in enumerate(("a.jsonl", "b.jsonl"))]

    def fit(self, out: str, *more: object) -> Path:
        given = ("--data", *self.data, "--tokens", 640, "--held-out-tokens", 128, "--sequence-tokens", 32)
        called(command, self.cluster, "--route", "weak", *given, "--out", self.folder / out, *more)
        return self.folder / out


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def test_a_fit_leaves_stitch_report_and_plot(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    out = bench.fit("weak.safetensors", "--epochs", 2)
    stitch = Stitch.load(out, torch.device("cpu"), torch.float32)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (stitch.binding.bottom_layers, stitch.binding.top_from) == (2, 1)
    assert stitch.making["losses"]["stitched"] == pytest.approx(report["losses"]["stitched"]["all"]["mean"], abs=1e-4)
    assert set(report["losses"]) == {"bottom", "top", "least squares", "stitched"}
    assert set(report["losses"]["stitched"]) == {"all", "a.jsonl", "b.jsonl"}
    assert report["history"]["held_out"][0][0] == 0
    assert report["first_token"] in ("held", "free")
    # What was measured in training has every first token where the top expects it; the better map comes close.
    assert report["losses"]["stitched"]["all"]["mean"] == pytest.approx(report["history"]["held_out"][-1][1], rel=0.05)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "stitched" in capsys.readouterr().out


def test_the_same_fit_gives_the_same_bytes(bench: Workbench) -> None:
    assert bench.fit("one.safetensors").read_bytes() == bench.fit("two.safetensors").read_bytes()


def test_another_seed_gives_another_stitch(bench: Workbench) -> None:
    assert bench.fit("one.safetensors").read_bytes() != bench.fit("two.safetensors", "--seed", 1).read_bytes()


def test_least_squares_alone_is_a_stitch_too(bench: Workbench) -> None:
    out = bench.fit("weak.safetensors", "--epochs", 0, "--store", "bfloat16")
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["losses"]["least squares"] == report["losses"]["stitched"]
    assert Stitch.load(out, torch.device("cpu"), torch.float32).making["method"] == "least squares"
    # Two bytes a value.
    assert 2 * 32 * 49 < out.stat().st_size < 4 * 32 * 49


def test_answers_are_another_aim(bench: Workbench) -> None:
    states, answers = bench.fit("states.safetensors"), bench.fit("answers.safetensors", "--aim", "answers")
    assert states.read_bytes() != answers.read_bytes()
    assert answers.read_bytes() == bench.fit("again.safetensors", "--aim", "answers").read_bytes()
    assert Stitch.load(answers, torch.device("cpu"), torch.float32).making["training"]["aim"] == "answers"
    with pytest.raises(InvalidRequest, match=r"begun with other settings; remove .*distil-2-1"):
        bench.fit("x.safetensors", "--work", bench.folder / "answers.safetensors.work")


def test_adapters_come_with_their_stitch(bench: Workbench) -> None:
    given = ("--adapter-rank", 2, "--epochs", 2, "--learning-rate", 0.01)
    plain, out = bench.fit("plain.safetensors"), bench.fit("adapted.safetensors", *given)
    assert out.read_bytes() == bench.fit("again.safetensors", *given).read_bytes()
    stitch = Stitch.load(out, torch.device("cpu"), torch.float32)
    assert stitch.adapters is not None
    assert (stitch.adapters.first, stitch.adapters.end, stitch.adapters.rank) == (1, 2, 2)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["training"]["adapter_rank"], stitch.making["training"]["adapter_rank"]) == (2, 2)
    # What was written is what the report measured, and `evaluate` counts it.
    rungs = []
    for file in (plain, out):
        file.replace(bench.folder / "weak.safetensors")
        held_out = ("--data", *bench.data, "--held-out-tokens", 128, "--sequence-tokens", 32)
        called(evaluate_command, bench.cluster, *held_out, "--out", bench.folder / "quality.json")
        systems = json.loads((bench.folder / "quality.json").read_text())["systems"]
        rungs += [row for row in systems if row["name"] == "weak"]
    assert rungs[1]["losses"]["all"]["mean"] == pytest.approx(report["losses"]["stitched"]["all"]["mean"], rel=1e-4)
    assert rungs[1]["parameters"] - rungs[0]["parameters"] == 2 * 2 * 32


def test_training_goes_on_from_a_stitch(bench: Workbench) -> None:
    given = ("--adapter-rank", 2, "--epochs", 2, "--learning-rate", 0.01)
    first = bench.fit("first.safetensors", *given)
    again = [bench.fit(f"{name}.safetensors", *given, "--start", first) for name in ("one", "two")]
    assert again[0].read_bytes() == again[1].read_bytes() != first.read_bytes()
    reports = [json.loads(file.with_suffix(".json").read_text()) for file in (first, again[0])]
    left, found = reports[0]["losses"]["stitched"], reports[1]["losses"]["start"]
    assert [found[file]["mean"] for file in left] == pytest.approx([one["mean"] for one in left.values()], rel=1e-4)
    start = Stitch.load(first, torch.device("cpu"), torch.float32)
    made = Stitch.load(again[0], torch.device("cpu"), torch.float32)
    assert made.making["training"]["start"] == start.fingerprint


def test_a_start_that_does_not_fit_is_refused(bench: Workbench) -> None:
    first = bench.fit("first.safetensors", "--adapter-rank", 2)
    with pytest.raises(InvalidRequest, match="adapter_rank is 3, but it must be 2, as in the start"):
        bench.fit("other.safetensors", "--adapter-rank", 3, "--start", first)
    with pytest.raises(Incompatible, match=r"none\.safetensors is no stitch"):
        bench.fit("other.safetensors", "--start", bench.folder / "none.safetensors")


def contents(path: Path) -> dict[str, list[float]]:
    """Every tensor's values; the order of a file's metadata is no matter."""
    return {name: tensor.flatten().tolist() for name, tensor in load_file(path).items()}


def test_a_fit_takes_up_what_a_sweep_left(bench: Workbench) -> None:
    given = ("--data", *bench.data, "--tokens", 640, "--held-out-tokens", 128, "--sequence-tokens", 32)
    out = bench.folder / "sweep.json"
    called(
        sweep_command, bench.cluster, *given, "--cuts", "1:0,1", "2:1", "--out", out, "--work", bench.folder / "work"
    )
    collected = bench.folder / "work" / "training" / "collected.safetensors"
    left = contents(collected)
    shared, own = bench.fit("a.safetensors", "--work", bench.folder / "work"), bench.fit("b.safetensors")
    assert contents(collected) == left
    assert shared.read_bytes() == own.read_bytes()


def test_a_fit_reuses_what_another_went_over(bench: Workbench) -> None:
    bench.fit("plain.safetensors")
    # Over more tokens, in another order.
    more = ("--tokens", 960, "--shares", 2, 1, "--reuse", bench.folder / "plain.safetensors.work")
    reusing = bench.fit("reusing.safetensors", *more)
    computed = bench.fit("computed.safetensors", *more[:5])
    reports = [json.loads(out.with_suffix(".json").read_text()) for out in (computed, reusing)]
    means = [report["losses"]["stitched"]["all"]["mean"] for report in reports]
    assert means[1] == pytest.approx(means[0], rel=1e-3)
    assert [report["reused"] for report in reports] == [[], ["plain.safetensors.work"]]
    # Had it computed them again, what was changed there would be nowhere.
    changed, kept = ("teacher-ids", bench.folder / "reusing.safetensors.work" / "held-out")
    earlier = bench.folder / "plain.safetensors.work" / "held-out"
    (earlier / changed).write_bytes(bytes(len((earlier / changed).read_bytes())))
    bench.fit("again.safetensors", *more)
    assert any((kept / changed).read_bytes())
    assert not any((bench.folder / "again.safetensors.work" / "held-out" / changed).read_bytes())


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        (("--sequence-tokens", 16), "its sequences have 32 tokens, not 16"),
        (("--dtype", "bfloat16"), "its pass is of other models, or of another dtype"),
        (("--reuse", "nowhere"), "reuse is 'nowhere', but no pass was begun there"),
    ],
)
def test_what_cannot_be_reused_is_refused(bench: Workbench, flags: tuple[object, ...], limit: str) -> None:
    bench.fit("plain.safetensors", "--epochs", 0)
    with pytest.raises(InvalidRequest, match=limit) as caught:
        bench.fit("other.safetensors", "--reuse", bench.folder / "plain.safetensors.work", *flags)
    assert caught.value.field == "reuse"


def test_a_sweep_ranks_its_cuts(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    out = bench.folder / "sweep.json"
    called(sweep_command, bench.cluster, "--data", *bench.data, "--tokens", 640, "--sequence-tokens", 32, "--out", out,
           "--cuts", "1:1", "2:0,1")  # fmt: skip
    systems = {row["name"]: row for row in json.loads(out.read_text())["systems"]}
    assert set(systems) == {"1 → 1", "2 → 0", "2 → 1", "bottom alone", "top alone"}
    assert systems["2 → 0"]["parameters"] > systems["2 → 1"]["parameters"] > systems["1 → 1"]["parameters"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(systems)
    assert out.with_suffix(".png").exists()


def test_an_evaluation_measures_every_route(bench: Workbench) -> None:
    fitted = json.loads(bench.fit("weak.safetensors").with_suffix(".json").read_text())["losses"]
    out = bench.folder / "quality.json"
    called(evaluate_command, bench.cluster, "--data", *bench.data, "--held-out-tokens", 128, "--sequence-tokens", 32,
           "--out", out)  # fmt: skip
    systems = {row["name"]: row for row in json.loads(out.read_text())["systems"]}
    assert set(systems) == {"weak", "bottom alone", "top alone"}
    assert systems["weak"]["losses"]["all"]["mean"] == pytest.approx(fitted["stitched"]["all"]["mean"], abs=1e-4)
    assert systems["bottom alone"]["losses"]["all"]["mean"] == pytest.approx(fitted["bottom"]["all"]["mean"], abs=1e-6)
    assert systems["bottom alone"]["agreement"]["mean"] == 1.0
    assert 0 <= systems["weak"]["agreement"]["mean"] < 1


def test_gold_answers_are_asked_for(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fit("weak.safetensors", "--epochs", 0)
    gold, out = bench.folder / "gold.jsonl", bench.folder / "quality.json"
    rows = [{"question": "What is it?", "answer": answer} for answer in ("no such words", "so #### 12345", "nor these")]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--gold", gold, "--gold-rows", 2, "--gold-tokens", 4, "--out", out)
    called(evaluate_command, bench.cluster, "--data", *bench.data, "--sequence-tokens", 32, *asked)
    assert [row["exact_match"]["mean"] for row in json.loads(out.read_text())["systems"]] == [0.0, 0.0, 0.0]
    gold.write_text('{"question": "What is it?"}\n')
    with pytest.raises(InvalidRequest, match=r"gold is 'gold\.jsonl:1', but it needs an `answer`"):
        called(evaluate_command, bench.cluster, "--data", *bench.data, *asked)


def test_a_stitch_of_another_cut_is_not_evaluated(bench: Workbench) -> None:
    bench.fit("weak.safetensors", "--epochs", 0)
    bench.cluster.write_text(bench.cluster.read_text().replace("bottom_layers = 2", "bottom_layers = 1"))
    with pytest.raises(Incompatible, match="from layer 2 to 1 can't serve a cut from layer 1 to 1"):
        called(evaluate_command, bench.cluster, "--data", *bench.data, "--sequence-tokens", 32)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--tokens", 0), "tokens"),
        (("--held-out-tokens", -1), "held_out_tokens"),
        (("--sequence-tokens", 4), "sequence_tokens"),
        (("--epochs", -1), "epochs"),
        (("--learning-rate", 0), "learning_rate"),
        (("--learning-rate", "nan"), "learning_rate"),
        (("--teacher-share", 1.5), "teacher_share"),
        (("--batch-sequences", 0), "batch_sequences"),
        (("--adapter-rank", -1), "adapter_rank"),
        (("--evaluations", 0), "evaluations"),
        (("--shares", 1), "shares"),
        (("--shares", 1, 0), "shares"),
        (("--route", "strong"), "route"),
    ],
)
def test_a_flag_out_of_range_is_named(bench: Workbench, flags: tuple[object, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bench.fit("weak.safetensors", *flags)
    assert caught.value.field == field


def test_a_route_without_a_stitch_has_none_to_fit(bench: Workbench) -> None:
    text = (
        bench.cluster.read_text().replace("top_from = 1", "top_from = 2").replace('stitch = "weak.safetensors"\n', "")
    )
    bench.cluster.write_text(text)
    with pytest.raises(InvalidRequest, match="gives it no stitch"):
        bench.fit("weak.safetensors")


def test_a_cut_beyond_the_model_is_refused(bench: Workbench) -> None:
    with pytest.raises(InvalidRequest, match="top_from is 2, but it must be 0 to 1"):
        called(sweep_command, bench.cluster, "--data", *bench.data, "--cuts", "2:2", "--out", bench.folder / "x.json")


@pytest.mark.parametrize("text", ["20", "20:", "20:a", ":3", "20:1,,2", "-1:2"])
def test_a_cut_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="a cut is written K:J"):
        sweep_command.parse_cuts(text)


def test_flags_are_known_without_torch() -> None:
    names = ", ".join(module.__name__ for module in MODULES)
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "False"
