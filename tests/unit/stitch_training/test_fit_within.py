"""A fit within a time limit: its stages, what it packs, and that an unpacked archive is resumed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch_server.model.stitch import Stitch
from stitch_training.cli import build_parser
from stitch_training.data import is_held_out, read_documents
from stitch_training.device import CPU
from stitch_training.distill import TrainingSettings
from stitch_training.fit_within import ANSWERS, PLAN, RUN, STITCH, FitWithinSettings, TimeLimit, fit_within
from tests.support.tiny_fit import write_chats, write_cluster

SECONDS = 1000.0
CHECKPOINT = "distil-2-1.safetensors"


class Interrupted(Exception):
    """Simulates a machine that is taken away."""


class Stopwatch:
    """A clock that stands still until a stage has reached a number of units; then it shows `then`."""

    def __init__(self, stage: str = "", units: int = 0, then: float = 0.0) -> None:
        self.now, self.seen = 0.0, list[str]()
        self._stage, self._units, self._then = stage, units, then

    def clock(self) -> float:
        return self.now

    def progress(self, stage: str, done: int, total: int) -> None:
        self.seen.append(stage)
        if stage == self._stage and done >= self._units:
            self.now = self._then


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a tiny cluster and prompts."""
    folder = tmp_path_factory.mktemp("within")
    write_cluster(folder)
    write_chats(folder / "chats.jsonl", count=60)
    return folder


def settings_of(folder: Path, run_dir: Path, **changed: Any) -> FitWithinSettings:
    training = TrainingSettings(adapter_rank=2, teacher_share=1.0, loss_on="assistant", evaluations=2)
    settings = FitWithinSettings(
        cluster=load_cluster(str(folder / "cluster.toml")),
        route="weak",
        prompts=(folder / "chats.jsonl",),
        run_dir=run_dir,
        out=run_dir.with_suffix(".tar"),
        seconds=SECONDS,
        device=CPU,
        dtype="float32",
        tokens=1600,
        held_out_tokens=64,
        sequence_tokens=16,
        max_tokens=8,
        temperature=0.7,
        training=training,
        pack_mebibytes=64,
    )
    return replace(settings, **changed)


def run(settings: FitWithinSettings, stopwatch: Stopwatch) -> dict[str, Any]:
    """Runs all stages and returns the archive's record."""
    fit_within(settings, TimeLimit(settings.seconds, 0.0, stopwatch.clock), stopwatch.progress)
    return record_of(settings)


def record_of(settings: FitWithinSettings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((settings.run_dir / RUN).read_text())
    return found


def names_in(archive: Path) -> Sequence[str]:
    with tarfile.open(archive) as opened:
        return opened.getnames()


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


@pytest.fixture(scope="module")
def finished(folder: Path) -> FitWithinSettings:
    """Returns the settings of a run that had time enough."""
    settings = settings_of(folder, folder / "finished")
    run(settings, Stopwatch())
    return settings


def test_a_run_with_time_enough_trains_on_all_answers(finished: FitWithinSettings) -> None:
    record = record_of(finished)
    assert record["steps"]["done"] == record["steps"]["planned"] > 0
    assert record["answers"]["training"]["tokens"] >= finished.tokens
    assert record["answers"]["held_out"]["tokens"] >= finished.held_out_tokens
    assert record["left_out"] == []
    assert set(names_in(finished.out)) == {
        RUN, STITCH, "stitch.json", "stitch.png", PLAN, ANSWERS, CHECKPOINT
    }  # fmt: skip
    stitch = Stitch.load(finished.run_dir / STITCH, torch.device("cpu"), torch.float32)
    assert stitch.adapters is not None
    assert stitch.adapters.rank == finished.training.adapter_rank


def test_answers_that_are_held_out_are_not_trained_on(finished: FitWithinSettings) -> None:
    report = json.loads((finished.run_dir / "stitch.json").read_text())
    assert report["held_out_tokens"] >= finished.held_out_tokens
    held_out = record_of(finished)["answers"]["held_out"]
    documents = [one for one in read_documents(finished.run_dir / ANSWERS) if is_held_out(one, 10)]
    assert len(documents) == held_out["answers"]


def test_answers_end_where_half_of_the_time_is_over(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, tmp_path / "run", tokens=100_000)
    stopwatch = Stopwatch("answers", 1000, then=0.6 * SECONDS)
    record = run(settings, stopwatch)
    assert 1000 <= record["answers"]["training"]["tokens"] < 3000
    assert record["answers"]["training"]["answers"] < 50
    assert record["steps"]["done"] == record["steps"]["planned"] > 0


def test_distillation_ends_before_the_limit_and_an_unpacked_archive_continues_it(
    folder: Path, finished: FitWithinSettings, tmp_path: Path
) -> None:
    settings = settings_of(folder, tmp_path / "first")
    record = run(settings, Stopwatch("distil", 3, then=SECONDS))
    assert record["steps"]["done"] == 3 < record["steps"]["planned"]
    unpack(settings.out, tmp_path / "second")
    resumed = settings_of(folder, tmp_path / "second")
    stopwatch = Stopwatch()
    record = run(resumed, stopwatch)
    assert "answers" not in stopwatch.seen
    assert record["steps"]["done"] == record["steps"]["planned"]
    expected, found = (load_file(one.run_dir / STITCH) for one in (finished, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected.keys() | found.keys())


def test_an_archive_of_answers_is_there_before_the_passes(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, tmp_path / "run")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "data":
            raise Interrupted

    with pytest.raises(Interrupted):
        fit_within(settings, TimeLimit(SECONDS, 0.0, lambda: 0.0), progress)
    assert set(names_in(settings.out)) == {RUN, ANSWERS}


def test_too_little_time_for_answers_is_said_and_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, tmp_path / "run")
    with pytest.raises(InvalidRequest, match=r"seconds is 1000\.0.*must fill a sequence of 16 tokens first"):
        fit_within(settings, TimeLimit(SECONDS, 0.0, lambda: 0.9 * SECONDS), Stopwatch().progress)
    assert not (settings.run_dir / PLAN).exists()
    assert run(settings, Stopwatch())["steps"]["done"] > 0


def test_what_does_not_fit_the_archive_is_left_out_and_named(
    folder: Path, finished: FitWithinSettings, tmp_path: Path
) -> None:
    unpack(finished.out, tmp_path / "run")
    (tmp_path / "run" / "distil-9-9.safetensors").write_bytes(bytes(2 << 20))
    settings = settings_of(folder, tmp_path / "run", pack_mebibytes=1)
    record = run(settings, Stopwatch())
    assert record["left_out"] == ["distil-9-9.safetensors"]
    assert CHECKPOINT in names_in(settings.out)
    assert settings.out.stat().st_size <= 1 << 20


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("seconds", 59.0, "at least 60"), ("temperature", 2.5, "0 to 2"), ("pack_mebibytes", 0, "at least 1")],
)
def test_values_out_of_range_are_refused(folder: Path, tmp_path: Path, field: str, value: float, limit: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is {value}.*{limit}"):
        settings_of(folder, tmp_path, **{field: value})


def test_fit_within_is_a_verb_with_a_limit_in_seconds(folder: Path, tmp_path: Path) -> None:
    given = ("--data", folder / "chats.jsonl", "--run-dir", tmp_path / "run", "--out", tmp_path / "run.tar")
    small = ("--tokens", 800, "--held-out-tokens", 64, "--sequence-tokens", 16, "--max-tokens", 4, "--adapter-rank", 2)
    flags = ("fit-within", folder / "cluster.toml", "--route", "weak", "--seconds", 600, *given, *small)
    parsed = build_parser().parse_args([str(flag) for flag in flags])
    parsed.call(parsed)
    assert STITCH in names_in(tmp_path / "run.tar")
