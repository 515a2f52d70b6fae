"""The verbs `fit`, `sweep` and `evaluate` over a tiny pair, from flags to files, and the program's exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stitch.cli.arguments import named
from stitch.errors import Incompatible, InvalidRequest, StitchError, Unavailable
from stitch_server.model.stitch import Stitch
from stitch_training import cli
from stitch_training.cli import build_parser, main, parse_costs, parse_cuts
from tests.support.tiny_fit import BOTTOM_LAYERS, write_chats, write_cluster, write_pair, write_texts


def call(*arguments: object) -> None:
    """Runs a verb without the handling of errors in `main`."""
    parsed = build_parser().parse_args([str(argument) for argument in arguments])
    parsed.call(parsed)


class Workbench:
    """A folder with a tiny cluster and two files of text."""

    def __init__(self, folder: Path, pair: Path) -> None:
        shutil.copytree(pair, folder, dirs_exist_ok=True)
        self.folder, self.cluster = folder, write_cluster(folder)
        self.data = [write_texts(folder / name, seed=seed) for seed, name in enumerate(("a.jsonl", "b.jsonl"))]

    def fit(self, out: str, *more: object) -> Path:
        return self._fit(out, "--route", "weak", *more)

    def control(self, model: str, out: str, *more: object) -> Path:
        return self._fit(out, "--control", model, *more)

    def _fit(self, out: str, *more: object) -> Path:
        given = ("--data", *self.data, "--tokens", 640, "--held-out-tokens", 128, "--sequence-tokens", 32)
        call("fit", self.cluster, *given, "--out", self.folder / out, *more)
        return self.folder / out

    def evaluate(self, *more: object) -> dict[str, dict[str, Any]]:
        """Returns the figures of every system by its name."""
        held_out, out = ("--held-out-tokens", 128, "--sequence-tokens", 32), self.folder / "quality.json"
        call("evaluate", self.cluster, "--data", *self.data, *held_out, "--out", out, *more)
        return {row["name"]: row for row in json.loads(out.read_text())["systems"]}


def content_loss(found: dict[str, Any]) -> float:
    return float(found["content"]["mean"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of every workbench, written once."""
    write_pair(folder := tmp_path_factory.mktemp("pair"))
    return folder


@pytest.fixture
def workbench(tmp_path: Path, pair: Path) -> Workbench:
    return Workbench(tmp_path, pair)


def test_fit_writes_stitch_report_and_plot(workbench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    out = workbench.fit("weak.safetensors", "--epochs", 2)
    stitch = Stitch.load(out, torch.device("cpu"), torch.float32)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (stitch.binding.bottom_layers, stitch.binding.top_from) == (2, 1)
    assert stitch.making["losses"]["stitched"] == pytest.approx(
        report["losses"]["stitched"]["content"]["mean"], abs=1e-4
    )
    assert set(report["losses"]) == {"bottom", "top", "least squares", "stitched"}
    assert set(report["losses"]["stitched"]) == {"content", "a.jsonl", "b.jsonl", "plain", "separator"}
    assert report["training"]["loss_on"] == stitch.making["training"]["loss_on"] == "content"
    assert report["history"]["held_out"][0][0] == 0
    assert report["first_token"] in ("held", "free")
    # Training minimizes the divergence from the bottom as well, which is less than the loss.
    assert min(loss for _, loss in report["history"]["held_out"]) < report["losses"]["stitched"]["content"]["mean"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "stitched" in capsys.readouterr().out


def test_fit_on_answers_alone_gives_another_stitch(workbench: Workbench) -> None:
    chats = write_chats(workbench.folder / "chats.jsonl")
    given = ("--data", chats, "--learning-rate", 0.01)
    content, answers = (workbench.fit(f"{on}.safetensors", *given, "--loss-on", on) for on in ("content", "assistant"))
    assert content.read_bytes() != answers.read_bytes()
    report = json.loads(answers.with_suffix(".json").read_text())
    assert report["training"]["loss_on"] == "assistant"
    slices = {"content", "chats.jsonl", "template", "separator", "user", "assistant", "end"}
    assert set(report["losses"]["stitched"]) == slices
    plain = ("--data", workbench.data[0], "--loss-on", "assistant")
    with pytest.raises(InvalidRequest, match="loss_on is 'assistant', but no held-out sequence has such a token"):
        workbench.fit("plain.safetensors", *plain)


ADAPTED = ("--adapter-rank", 2, "--epochs", 3, "--learning-rate", 0.02)


def test_controls_are_whole_models_that_have_learnt(workbench: Workbench) -> None:
    workbench.fit("weak.safetensors", *ADAPTED)
    files = {
        name: workbench.control(name, f"{index}.safetensors", *ADAPTED)
        for index, name in enumerate(("bottom", "top", "top:1", "bottom:2"))
    }
    systems = workbench.evaluate("--controls", *files.values())
    names = {
        "bottom": "bottom alone, adapted",
        "top": "top alone, adapted",
        "top:1": "top alone, 1 → 1",
        "bottom:2": "bottom alone, 2 → 2",
    }
    assert {one: systems[one]["kind"] for one in names.values()} == dict(
        zip(names.values(), ("adapted", "adapted", "control", "control"), strict=True)
    )
    for control, name in names.items():
        report = json.loads(files[control].with_suffix(".json").read_text())
        model = name.split(",")[0]
        before, after = (content_loss(report["losses"][key]) for key in ("whole model", "stitched"))
        assert before == pytest.approx(content_loss(systems[model]["losses"]), rel=1e-3)
        assert content_loss(systems[name]["losses"]) == pytest.approx(after, rel=1e-3)
        assert report["control"] == control
    # On random text only the teacher can be learnt from, and the bottom is its own.
    assert content_loss(systems[names["top"]]["losses"]) != content_loss(systems["top alone"]["losses"])
    layers = {"bottom": (3, 48), "top": (2, 32)}
    for model, (count, width) in layers.items():
        added = systems[names[model]]["parameters"] - systems[f"{model} alone"]["parameters"]
        assert added == 2 * 2 * width * count
    assert systems["top alone, 1 → 1"]["parameters"] - systems["top alone"]["parameters"] == 32 * 33 + 2 * 2 * 32
    # The gap is that between the adapted ends.
    ends = [content_loss(systems[names[one]]["losses"]) for one in ("top", "bottom")]
    closed = (ends[0] - content_loss(systems["weak"]["losses"])) / (ends[0] - ends[1])
    assert systems["weak"]["gap_closed"]["mean"] == pytest.approx(closed)
    with pytest.raises(InvalidRequest, match="they must be different ones"):
        workbench.evaluate("--controls", files["top"], files["top"])
    with pytest.raises(Incompatible, match="is made for the top model"):
        workbench.evaluate("--controls", workbench.folder / "weak.safetensors")


def test_control_starts_from_the_whole_model(workbench: Workbench) -> None:
    report = json.loads(
        workbench.control("top:1", "control.safetensors", "--epochs", 0).with_suffix(".json").read_text()
    )
    assert set(report["losses"]) == {"whole model", "stitched"}
    assert report["losses"]["stitched"] == report["losses"]["whole model"]


def test_control_of_the_top_takes_its_teacher_from_the_run_of_a_route(workbench: Workbench) -> None:
    workbench.fit("weak.safetensors")
    computed = workbench.control("top", "computed.safetensors", *ADAPTED)
    reusing = workbench.control(
        "top", "reusing.safetensors", *ADAPTED, "--reuse", workbench.folder / "weak.safetensors.run"
    )
    assert computed.read_bytes() == reusing.read_bytes()
    teachers = [workbench.folder / f"{name}.safetensors.run" / "training" for name in ("weak", "computed")]
    assert [(one / "teacher-ids").read_bytes() for one in teachers] == [(teachers[0] / "teacher-ids").read_bytes()] * 2


@pytest.mark.parametrize(
    ("control", "flags", "field"),
    [
        ("top", (), "adapter_rank"),
        ("top:1", ("--aim", "answers"), "aim"),
        ("top:2", (), "top_from"),
        ("middle", (), "control"),
        ("top:", (), "control"),
        ("top:x", (), "control"),
    ],
)
def test_invalid_control_is_refused(workbench: Workbench, control: str, flags: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        workbench.control(control, "control.safetensors", *flags)
    assert caught.value.field == field


def test_same_fit_gives_the_same_bytes(workbench: Workbench) -> None:
    assert workbench.fit("one.safetensors").read_bytes() == workbench.fit("two.safetensors").read_bytes()


def test_another_seed_gives_another_stitch(workbench: Workbench) -> None:
    assert workbench.fit("one.safetensors").read_bytes() != workbench.fit("two.safetensors", "--seed", 1).read_bytes()


def test_fit_without_epochs_writes_the_least_squares_stitch(workbench: Workbench) -> None:
    out = workbench.fit("weak.safetensors", "--epochs", 0, "--store", "bfloat16")
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["losses"]["least squares"] == report["losses"]["stitched"]
    assert Stitch.load(out, torch.device("cpu"), torch.float32).making["method"] == "least squares"
    # Two bytes a value.
    assert 2 * 32 * 49 < out.stat().st_size < 4 * 32 * 49


def test_fit_with_the_aim_answers_gives_another_stitch(workbench: Workbench) -> None:
    states, answers = workbench.fit("states.safetensors"), workbench.fit("answers.safetensors", "--aim", "answers")
    assert states.read_bytes() != answers.read_bytes()
    assert answers.read_bytes() == workbench.fit("again.safetensors", "--aim", "answers").read_bytes()
    assert Stitch.load(answers, torch.device("cpu"), torch.float32).making["training"]["aim"] == "answers"
    with pytest.raises(InvalidRequest, match=r"it has other settings; remove .*distil-2-1"):
        workbench.fit("x.safetensors", "--run-dir", workbench.folder / "answers.safetensors.run")


def test_fit_writes_adapters_with_their_stitch(workbench: Workbench) -> None:
    given = ("--adapter-rank", 2, "--epochs", 2, "--learning-rate", 0.01)
    plain, out = workbench.fit("plain.safetensors"), workbench.fit("adapted.safetensors", *given)
    assert out.read_bytes() == workbench.fit("again.safetensors", *given).read_bytes()
    stitch = Stitch.load(out, torch.device("cpu"), torch.float32)
    assert stitch.adapters is not None
    assert (stitch.adapters.first, stitch.adapters.end, stitch.adapters.rank) == (1, 2, 2)
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["training"]["adapter_rank"], stitch.making["training"]["adapter_rank"]) == (2, 2)
    # `evaluate` measures the written adapters as the report did, and counts their parameters.
    rows = []
    for file in (plain, out):
        file.replace(workbench.folder / "weak.safetensors")
        held_out = ("--data", *workbench.data, "--held-out-tokens", 128, "--sequence-tokens", 32)
        call("evaluate", workbench.cluster, *held_out, "--out", workbench.folder / "quality.json")
        systems = json.loads((workbench.folder / "quality.json").read_text())["systems"]
        rows += [row for row in systems if row["name"] == "weak"]
    assert rows[1]["losses"]["content"]["mean"] == pytest.approx(
        report["losses"]["stitched"]["content"]["mean"], rel=1e-4
    )
    assert rows[1]["parameters"] - rows[0]["parameters"] == 2 * 2 * 32


def test_fit_starts_from_a_given_stitch(workbench: Workbench) -> None:
    given = ("--adapter-rank", 2, "--epochs", 2, "--learning-rate", 0.01)
    first = workbench.fit("first.safetensors", *given)
    again = [workbench.fit(f"{name}.safetensors", *given, "--start", first) for name in ("one", "two")]
    assert again[0].read_bytes() == again[1].read_bytes() != first.read_bytes()
    reports = [json.loads(file.with_suffix(".json").read_text()) for file in (first, again[0])]
    left, found = reports[0]["losses"]["stitched"], reports[1]["losses"]["start"]
    assert [found[file]["mean"] for file in left] == pytest.approx([one["mean"] for one in left.values()], rel=1e-4)
    start = Stitch.load(first, torch.device("cpu"), torch.float32)
    made = Stitch.load(again[0], torch.device("cpu"), torch.float32)
    assert made.making["training"]["start"] == start.fingerprint


def test_start_of_another_rank_or_format_is_refused(workbench: Workbench) -> None:
    first = workbench.fit("first.safetensors", "--adapter-rank", 2)
    with pytest.raises(InvalidRequest, match="adapter_rank is 3, but it must be 2, as in the start"):
        workbench.fit("other.safetensors", "--adapter-rank", 3, "--start", first)
    with pytest.raises(Incompatible, match=r"none\.safetensors is no stitch"):
        workbench.fit("other.safetensors", "--start", workbench.folder / "none.safetensors")


def contents(path: Path) -> dict[str, list[float]]:
    """Returns every tensor's values; the order of a file's metadata does not matter."""
    return {name: tensor.flatten().tolist() for name, tensor in load_file(path).items()}


def test_fit_reuses_the_run_directory_of_a_sweep(workbench: Workbench) -> None:
    given = ("--data", *workbench.data, "--tokens", 640, "--held-out-tokens", 128, "--sequence-tokens", 32)
    out = workbench.folder / "sweep.json"
    call(
        "sweep",
        workbench.cluster,
        *given,
        "--cuts",
        "1:0,1",
        "2:1",
        "--out",
        out,
        "--run-dir",
        workbench.folder / "run",
    )
    checkpoint = workbench.folder / "run" / "training" / "checkpoint.safetensors"
    left = contents(checkpoint)
    shared, own = workbench.fit("a.safetensors", "--run-dir", workbench.folder / "run"), workbench.fit("b.safetensors")
    assert contents(checkpoint) == left
    assert shared.read_bytes() == own.read_bytes()


def test_fit_reuses_the_sequences_of_another_fit(workbench: Workbench) -> None:
    workbench.fit("plain.safetensors")
    # Over more tokens, in another order.
    more = ("--tokens", 960, "--shares", 2, 1, "--reuse", workbench.folder / "plain.safetensors.run")
    reusing = workbench.fit("reusing.safetensors", *more)
    computed = workbench.fit("computed.safetensors", *more[:5])
    reports = [json.loads(out.with_suffix(".json").read_text()) for out in (computed, reusing)]
    means = [report["losses"]["stitched"]["content"]["mean"] for report in reports]
    assert means[1] == pytest.approx(means[0], rel=1e-3)
    assert [report["reused"] for report in reports] == [[], ["plain.safetensors.run"]]
    # Zeros written into the earlier pass reappear only where its sequences are reused.
    changed, kept = ("teacher-ids", workbench.folder / "reusing.safetensors.run" / "held-out")
    earlier = workbench.folder / "plain.safetensors.run" / "held-out"
    (earlier / changed).write_bytes(bytes(len((earlier / changed).read_bytes())))
    workbench.fit("again.safetensors", *more)
    assert any((kept / changed).read_bytes())
    assert not any((workbench.folder / "again.safetensors.run" / "held-out" / changed).read_bytes())


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        (("--sequence-tokens", 16), "its sequences have 32 tokens, not 16"),
        (("--dtype", "bfloat16"), "its pass is of other models, or of another dtype"),
        (("--reuse", "nowhere"), "reuse is 'nowhere', but it holds no pass"),
    ],
)
def test_run_directory_of_other_settings_is_not_reused(
    workbench: Workbench, flags: tuple[object, ...], limit: str
) -> None:
    workbench.fit("plain.safetensors", "--epochs", 0)
    with pytest.raises(InvalidRequest, match=limit) as caught:
        workbench.fit("other.safetensors", "--reuse", workbench.folder / "plain.safetensors.run", *flags)
    assert caught.value.field == "reuse"


def test_sweep_writes_a_ladder_of_its_cuts(workbench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    out = workbench.folder / "sweep.json"
    call("sweep", workbench.cluster, "--data", *workbench.data, "--tokens", 640, "--sequence-tokens", 32, "--out", out,
           "--cuts", "1:1", "2:0,1")  # fmt: skip
    report = json.loads(out.read_text())
    systems = {row["name"]: row for row in report["systems"]}
    assert set(systems) == {"1 → 1", "2 → 0", "2 → 1", "bottom alone", "top alone"}
    diverging = [systems[name]["figures"]["divergence"]["mean"] for name in report["ranking"]]
    assert diverging == sorted(diverging)
    assert report["loss_on"] == "content"
    assert systems["2 → 0"]["parameters"] > systems["2 → 1"]["parameters"] > systems["1 → 1"]["parameters"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3
    assert out.with_suffix(".png").exists()


def test_sweep_leaves_out_cuts_that_save_too_little(workbench: Workbench) -> None:
    out = workbench.folder / "sweep.json"
    given = ("--data", *workbench.data, "--tokens", 640, "--sequence-tokens", 32, "--out", out, "--cuts", "1:1", "2:0")
    call("sweep", workbench.cluster, *given, "--least-saving", 0.3)
    assert json.loads(out.read_text())["ranking"] == ["1 → 1"]
    with pytest.raises(InvalidRequest, match=r"least_saving is 0\.9, but none of 2 cuts saves as much"):
        call("sweep", workbench.cluster, *given, "--least-saving", 0.9)
    with pytest.raises(InvalidRequest, match="loss_on is 'assistant', but no held-out sequence has such a token"):
        call("sweep", workbench.cluster, *given, "--loss-on", "assistant", "--run-dir", workbench.folder / "run")


def test_evaluate_measures_every_route(workbench: Workbench) -> None:
    fitted = json.loads(workbench.fit("weak.safetensors").with_suffix(".json").read_text())["losses"]
    out = workbench.folder / "quality.json"
    small = '[[routes]]\nname = "small"\nbottom_layers = 0\ntop_from = 0\n'
    whole = f'[[routes]]\nname = "whole"\nbottom_layers = {BOTTOM_LAYERS}\n'
    workbench.cluster.write_text(workbench.cluster.read_text() + small + whole)
    call("evaluate", workbench.cluster, "--data", *workbench.data, "--held-out-tokens", 128, "--sequence-tokens", 32,
           "--out", out)  # fmt: skip
    systems = {row["name"]: row for row in json.loads(out.read_text())["systems"]}
    # A route of one model alone is that model.
    assert set(systems) == {"weak", "bottom alone", "top alone"}
    for system, name in (("weak", "stitched"), ("bottom alone", "bottom"), ("top alone", "top")):
        for part in ("content", "a.jsonl", "separator"):
            # The trace of a fit keeps bfloat16.
            expected = pytest.approx(fitted[name][part]["mean"], abs=1e-3)
            assert systems[system]["losses"][part]["mean"] == expected
    assert systems["bottom alone"]["agreement"]["content"]["mean"] == 1.0
    assert 0 <= systems["weak"]["agreement"]["content"]["mean"] < 1
    assert "| weak |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").exists()


def test_evaluate_measures_quantized_weights_and_takes_measured_times(workbench: Workbench) -> None:
    workbench.fit("weak.safetensors", "--epochs", 0)
    whole = f'[[routes]]\nname = "whole"\nbottom_layers = {BOTTOM_LAYERS}\n'
    workbench.cluster.write_text(workbench.cluster.read_text() + whole)
    names = [f"{route}{kind}, {time}" for route in ("weak", "whole") for kind in ("", ", int8", ", int4")
             for time in ("ms per token", "TTFT in ms")]  # fmt: skip
    samples = {name: [1.0 + number, 3.0 + number] for number, name in enumerate(names)}
    times = workbench.folder / "times.json"
    times.write_text(json.dumps({"samples": samples}))
    systems = workbench.evaluate("--quantizations", "int8", "int4", "--timings", times)
    assert len(systems) == 9
    exact, eight, four = (systems[f"weak{kind}"] for kind in ("", ", int8", ", int4"))
    assert (exact["kind"], eight["kind"], four["kind"]) == ("route", "quantized", "quantized")
    assert len({content_loss(one["losses"]) for one in (exact, eight, four)}) == 3
    assert [one["figures"]["ms per token"]["mean"] for one in (exact, eight, four)] == [2.0, 4.0, 6.0]
    assert systems["bottom alone, int4"]["figures"]["TTFT in ms"]["mean"] == 13.0
    assert systems["top alone"]["figures"] == {}
    del samples["whole, int4, TTFT in ms"]
    times.write_text(json.dumps({"samples": samples}))
    with pytest.raises(
        InvalidRequest, match=r"timings is 'times\.json', but it must time every route: 'whole, int4, TTFT"
    ):
        workbench.evaluate("--quantizations", "int8", "int4", "--timings", times)


def test_evaluate_measures_exact_match_with_gold_answers(
    workbench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    workbench.fit("weak.safetensors", "--epochs", 0)
    gold, out = workbench.folder / "gold.jsonl", workbench.folder / "quality.json"
    rows = [{"question": "What is it?", "answer": answer} for answer in ("no such words", "so #### 12345", "nor these")]
    gold.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = ("--gold", gold, "--gold-rows", 2, "--gold-tokens", 4, "--out", out)
    prompts = ("--prompts", gold, "--prompt-tokens", 4, "--held-out-percent", 100)
    call("evaluate", workbench.cluster, "--data", *workbench.data, "--sequence-tokens", 32, *questions, *prompts)
    report = json.loads(out.read_text())
    figures = [row["figures"] for row in report["systems"]]
    assert [one["exact match"]["mean"] for one in figures] == [0.0, 0.0, 0.0]
    assert {name for one in figures for name in one} == {"agreement", "repeated 4-grams", "marked", "exact match"}
    assert report["answers"]["gold"] == {"file": "gold.jsonl", "rows": 2, "tokens": 4}
    assert report["differences"]["agreement"]["bottom alone"]["weak"]["mean"] >= 0


def test_evaluate_refuses_a_stitch_of_another_cut(workbench: Workbench) -> None:
    workbench.fit("weak.safetensors", "--epochs", 0)
    workbench.cluster.write_text(workbench.cluster.read_text().replace("bottom_layers = 2", "bottom_layers = 1"))
    with pytest.raises(Incompatible, match="from layer 2 to 1 can't serve a cut from layer 1 to 1"):
        call("evaluate", workbench.cluster, "--data", *workbench.data, "--sequence-tokens", 32)


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
def test_flag_out_of_range_is_refused_by_name(workbench: Workbench, flags: tuple[object, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        workbench.fit("weak.safetensors", *flags)
    assert caught.value.field == field


def test_fit_of_a_route_without_a_stitch_is_refused(workbench: Workbench) -> None:
    text = (
        workbench.cluster.read_text()
        .replace("bottom_layers = 2", "bottom_layers = 1")
        .replace('stitch = "weak.safetensors"\n', "")
    )
    workbench.cluster.write_text(text)
    with pytest.raises(InvalidRequest, match="gives it no stitch"):
        workbench.fit("weak.safetensors")


def test_sweep_of_a_cut_beyond_the_model_is_refused(workbench: Workbench) -> None:
    with pytest.raises(InvalidRequest, match="top_from is 2, but it must be 0 to 1"):
        call(
            "sweep", workbench.cluster, "--data", *workbench.data, "--cuts", "2:2", "--out", workbench.folder / "x.json"
        )


@pytest.mark.parametrize("text", ["20", "20:", "20:a", ":3", "20:1,,2", "-1:2"])
def test_invalid_cut_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="a cut is written K:J"):
        parse_cuts(text)


def test_named_parses_pairs() -> None:
    assert named(["a=b", "c=d=e"], "rename") == {"a": "b", "c": "d=e"}
    assert named([], "rename") == {}


@pytest.mark.parametrize("pair", ["a", "=b", "a=", ""])
def test_invalid_pair_is_refused_by_its_flag(pair: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        named([pair], "rename")
    assert (refused.value.field, refused.value.value) == ("rename", pair)


def test_parse_costs_returns_none_without_pairs() -> None:
    assert parse_costs(["a=1e3", "b=2"]) == {"a": 1000.0, "b": 2.0}
    assert parse_costs([]) is None


FIT = ["fit", "smollm2", "--route", "weak", "--data", "x", "--out", "y"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("data", "x", "it is empty"), 2),
        (Incompatible("another model"), 2),
        (Unavailable("gone"), 1),
        (OSError("disk full"), 1),
    ],
)
def test_main_prints_one_sentence_and_returns_a_status(
    error: StitchError | OSError, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(parsed: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_fit", fail)
    assert main(FIT) == status
    assert capsys.readouterr().err == f"stitch-train: {error}\n"


def test_main_does_not_hide_a_programming_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_fit", lambda parsed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(FIT)


def test_data_and_rename_take_several_values() -> None:
    parsed = build_parser().parse_args(["router", "train", "--out", "o", "--data", "a", "b", "--rename", "x=weak"])
    assert ([path.name for path in parsed.data], parsed.rename) == (["a", "b"], ["x=weak"])


def test_label_flags_have_defaults() -> None:
    parsed = build_parser().parse_args(["label", "--gateway", "h:1", "--data", "a", "--out", "b"])
    assert (parsed.max_tokens, parsed.concurrency, parsed.plain, parsed.routes) == (256, 8, False, None)


def test_parser_is_built_without_the_packages_that_verbs_need() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'grpc', 'safetensors', 'pydantic'}"
    code = f"import sys, stitch_training.cli as cli; cli.build_parser(); sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "set()"
