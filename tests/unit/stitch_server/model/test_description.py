"""A model folder tells its sizes, its end tokens and a fingerprint that is the same everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription, eos_token_ids, revision
from stitch_server.model.weights import INDEX_FILE
from tests.support.tiny_model import CONTEXT_LENGTH, TOKENS, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen3", layers=3, hidden_size=48, heads=6, padding_rows=5)


def test_sizes_are_those_of_the_config(folder: Path) -> None:
    described = ModelDescription.read(folder, "tiny/model")
    assert (described.id, described.architecture, described.layers) == ("tiny/model", "qwen3", 3)
    assert (described.hidden_size, described.heads, described.kv_heads, described.head_dim) == (48, 6, 2, 8)
    assert (described.vocabulary_size, described.context_length) == (TOKENS + 5, CONTEXT_LENGTH)


@pytest.mark.parametrize("left_out", ["head_dim", "num_key_value_heads"])
def test_what_a_config_leaves_out_follows_from_the_rest(tmp_path: Path, left_out: str) -> None:
    folder = write_tiny_model(tmp_path, "qwen2", heads=4, kv_heads=4)
    config = json.loads((folder / "config.json").read_text())
    config[left_out] = None
    (folder / "config.json").write_text(json.dumps(config))
    described = ModelDescription.read(folder, "x")
    assert (described.kv_heads, described.head_dim) == (4, 8)


def test_neighbours_are_told_the_same(folder: Path) -> None:
    described = ModelDescription.read(folder, "tiny/model")
    message = described.to_proto()
    for field in message.DESCRIPTOR.fields:
        assert getattr(message, field.name) == getattr(described, field.name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"has no config\.json, so it is no model folder"):
        ModelDescription.read(tmp_path, "x")


class TestEndTokens:
    def test_generation_config_comes_first(self, folder: Path) -> None:
        assert eos_token_ids(folder) == (2, 0)

    @pytest.mark.parametrize(("given", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, (2,))])
    def test_one_many_or_those_of_the_config(
        self, folder: Path, given: int | list[int] | None, expected: tuple[int, ...]
    ) -> None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        assert eos_token_ids(folder) == expected

    def test_a_model_may_have_none(self, tmp_path: Path) -> None:
        assert eos_token_ids(tmp_path) == ()


class TestRevision:
    def test_the_same_weights_have_the_same(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "copy")
        assert revision(tmp_path / "copy") == revision(folder)
        assert len(revision(folder)) == 16

    def test_does_not_depend_on_how_they_are_spread_over_files(self, folder: Path) -> None:
        before, tensors = revision(folder), load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"two.safetensors": names[::2], "one.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        places = {name: file for file, held in parts.items() for name in held}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
        assert revision(folder) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda name, tensor: (name, tensor + (name == "model.norm.weight") * 1e-3),
            lambda name, tensor: (name.replace("model.norm", "model.other"), tensor),
            lambda name, tensor: (name, tensor.bfloat16() if name == "model.norm.weight" else tensor),
            lambda name, tensor: (name, tensor.T.contiguous() if name == "lm_head.weight" else tensor),
        ],
        ids=["value", "name", "dtype", "shape"],
    )
    def test_changes_with(self, folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
        before, file = revision(folder), folder / "model.safetensors"
        save_file(dict(change(name, tensor) for name, tensor in load_file(file).items()), file)
        assert revision(folder) != before

    def test_other_seeds_are_other_models(self, tmp_path: Path) -> None:
        made = [revision(write_tiny_model(tmp_path / str(seed), layers=1, seed=seed)) for seed in (0, 1)]
        assert made[0] != made[1]

    def test_the_same_seed_is_the_same_model(self, tmp_path: Path) -> None:
        torch.manual_seed(99)
        made = [revision(write_tiny_model(tmp_path / name, layers=1)) for name in "ab"]
        assert made[0] == made[1]
