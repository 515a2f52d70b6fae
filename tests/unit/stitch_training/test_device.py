"""Training on another device than the CPU: its name, and that tensors are on it where they are used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch_training.answer_quality import AnswerSettings
from stitch_training.cli import main
from stitch_training.data import DataSettings
from stitch_training.device import CPU, CPU_BATCH_SEQUENCES, GPU_BATCH_SEQUENCES, batch_sequences, training_device
from stitch_training.distill import TrainingSettings
from stitch_training.evaluate import EvaluationSettings, evaluate
from stitch_training.ffn_skip import SkipSettings, fit_gates
from stitch_training.fit import Control, FitSettings, fit, write_fit
from stitch_training.least_squares import CutPoint
from stitch_training.probe import FeatureExtractor
from stitch_training.sweep import SweepSettings, sweep
from tests.support.meta_device import META, MetaAccelerator, MixedDevices
from tests.support.tiny_fit import write_chats, write_cluster, write_texts

RANK = 2
SEQUENCE_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a tiny cluster, two files of text, and the stitch of its route."""
    folder = tmp_path_factory.mktemp("device")
    write_cluster(folder)
    write_texts(folder / "texts.jsonl")
    write_chats(folder / "chats.jsonl", seed=1)
    write_fit(fit(fit_settings(folder, "weak", "cpu", CPU), ignore), folder / "weak.safetensors", "float32")
    return folder


def ignore(task: str, done: int, total: int) -> None:
    """Progress is of no interest."""


def data_of(folder: Path) -> DataSettings:
    files = folder / "texts.jsonl", folder / "chats.jsonl"
    return DataSettings(files, tokens=24 * SEQUENCE_TOKENS, held_out_tokens=128, sequence_tokens=SEQUENCE_TOKENS)


def fit_settings(folder: Path, subject: str | Control, run: str, device: torch.device, **training: Any) -> FitSettings:
    return FitSettings(
        cluster=load_cluster(str(folder / "cluster.toml")),
        subject=subject,
        data=data_of(folder),
        training=TrainingSettings(adapter_rank=RANK, **training),
        dtype="float32",
        run_dir=folder / run,
        device=device,
    )


def test_training_device_names_the_cpu() -> None:
    assert training_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2])
def test_training_device_takes_every_gpu_that_torch_sees(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert training_device("cuda") == torch.device("cuda:0")
    assert training_device(f"cuda:{count - 1}") == torch.device(f"cuda:{count - 1}")
    with pytest.raises(InvalidRequest, match=f"device is 'cuda:{count}', but torch sees {count} CUDA devices"):
        training_device(f"cuda:{count}")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "meta", "mps", "cuda:²", ""])
def test_training_device_refuses_other_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape("it must be cpu, cuda or cuda:N")):
        training_device(name)


def test_a_missing_gpu_is_refused_before_models_are_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ("--data", str(folder / "texts.jsonl"), "--out", str(folder / "x.json"), "--device", "cuda:99")
    assert main(["evaluate", str(folder / "cluster.toml"), *text]) == 2
    assert re.search(r"device is 'cuda:99', but torch sees \d+ CUDA devices", capsys.readouterr().err)


def test_batches_are_larger_on_a_gpu() -> None:
    assert batch_sequences(CPU) == CPU_BATCH_SEQUENCES
    assert batch_sequences(torch.device("cuda", 0)) == GPU_BATCH_SEQUENCES


def test_meta_accelerator_refuses_tensors_of_two_devices() -> None:
    with MetaAccelerator(), pytest.raises(MixedDevices, match="mm"):
        torch.mm(torch.ones(2, 2, device=META), torch.ones(2, 2))


def test_meta_accelerator_gives_zeros_to_the_cpu() -> None:
    with MetaAccelerator():
        ones = torch.ones(2, device=META)
        assert ones.sum().item() == 0.0
        assert ones.cpu().tolist() == [0.0, 0.0]
        assert torch.ones(2).copy_(ones).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("subject", "training"),
    [("weak", {}), ("weak", {"aim": "answers"}), (Control("top"), {}), (Control("top", 1), {"loss_on": "assistant"})],
    ids=["route", "answers", "adapted-top", "identity-cut"],
)
def test_fit_keeps_all_tensors_on_the_device(folder: Path, subject: str | Control, training: dict[str, Any]) -> None:
    name = f"meta-{subject}-{len(training)}"
    settings = fit_settings(folder, subject, name, META, **training)
    with MetaAccelerator() as accelerator:
        fitted = fit(settings, ignore)
        write_fit(fitted, folder / f"{name}.safetensors", "float32")
    assert fitted.map.weight.device == META
    assert fitted.adapters is not None
    assert fitted.adapters.down.device == META
    assert {"aten.addmm_.default", "aten._linalg_eigh.default"} <= accelerator.operations
    assert "aten.silu_backward.default" in accelerator.operations
    assert json.loads((folder / f"{name}.json").read_text())["device"] == "meta"


def test_distillation_resumes_on_the_device(folder: Path) -> None:
    settings = fit_settings(folder, "weak", "meta-resumed", META)
    with MetaAccelerator():
        steps = len(fit(settings, ignore).report["history"]["training"])
        again = fit(settings, ignore)
    assert len(again.report["history"]["training"]) == steps > 0


def test_sweep_keeps_all_tensors_on_the_device(folder: Path) -> None:
    cluster, cuts = load_cluster(str(folder / "cluster.toml")), (CutPoint(1, 1), CutPoint(2, 1))
    settings = SweepSettings(cluster, cuts, data_of(folder), "float32", folder / "meta-sweep", device=META)
    with MetaAccelerator() as accelerator:
        found = sweep(settings, ignore)
    assert len(found.ranking()) == len(cuts)
    assert "aten._linalg_eigh.default" in accelerator.operations


def test_gates_keep_all_tensors_on_the_device(folder: Path) -> None:
    cluster = load_cluster(str(folder / "cluster.toml"))
    settings = SkipSettings(cluster, "bottom", data_of(folder), "float32", folder / "meta-gates", device=META)
    with MetaAccelerator() as accelerator:
        fitted = fit_gates(settings, ignore)
        fitted.gates.save(folder / "meta-gates.safetensors")
    assert "aten.silu_backward.default" in accelerator.operations
    assert fitted.report["device"] == "meta"


def test_evaluate_keeps_all_tensors_on_the_device(folder: Path) -> None:
    answers = AnswerSettings(prompts=(folder / "chats.jsonl",), prompt_rows=3, prompt_tokens=4)
    cluster = load_cluster(str(folder / "cluster.toml"))
    settings = EvaluationSettings(cluster, data_of(folder), "float32", answers=answers, device=META)
    with MetaAccelerator() as accelerator:
        ladder = evaluate(settings, ignore)
    assert [rung.name for rung in ladder.rungs] == ["weak"]
    assert {"agreement", "repeated 4-grams"} <= ladder.rungs[0].figures.keys()
    assert "aten.index_copy_.default" in accelerator.operations


def test_probe_features_are_computed_on_the_device(folder: Path) -> None:
    extractor = FeatureExtractor.load(folder / "bottom", 2, 8, torch.float32, is_chat=False, device=META)
    with MetaAccelerator() as accelerator:
        rows = extractor.from_tokens([[1, 2, 3], [4, 5, 6]], lambda done, total: None)
    assert rows.shape[0] == 2
    assert not rows.any()
    assert "aten.embedding.default" in accelerator.operations
