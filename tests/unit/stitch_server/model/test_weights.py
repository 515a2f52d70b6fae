"""Tensors are read from a folder's files, and missing files and tensors are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stitch.errors import Incompatible
from stitch_server.model.weights import INDEX_FILE, Weights, weight_files
from tests.support.whole_model import CPU


@pytest.fixture
def split_model(tmp_path: Path) -> Path:
    """A model in two files with an index, beside a file that the index does not list."""
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.full((2,), 0.1)}, tmp_path / "model-2.safetensors")
    save_file({"d": torch.zeros(1)}, tmp_path / "other.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_reads_tensors_of_several_files(split_model: Path) -> None:
    with Weights(split_model, CPU, torch.float32) as weights:
        assert torch.equal(weights.read("a"), torch.arange(3.0))
        assert torch.equal(weights.read("c"), torch.full((2,), 0.1))


def test_reads_a_single_file_without_index(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    with Weights(tmp_path, CPU, torch.float32) as weights:
        assert ("a" in weights, "b" in weights) == (True, False)
        assert torch.equal(weights.read("a"), torch.arange(3.0))


def test_converts_to_the_dtype(split_model: Path) -> None:
    with Weights(split_model, CPU, torch.bfloat16) as weights:
        assert torch.equal(weights.read("c"), torch.full((2,), 0.1).bfloat16())


def test_only_files_of_the_index_are_read(split_model: Path) -> None:
    with Weights(split_model, CPU, torch.float32) as weights:
        assert "d" not in weights


def test_missing_tensor_is_named_with_its_folder(split_model: Path) -> None:
    with Weights(split_model, CPU, torch.float32) as weights, pytest.raises(Incompatible) as refused:
        weights.read("model.norm.weight")
    assert str(refused.value) == f"tensor model.norm.weight is not in {split_model}"


def test_tensors_outlive_the_files(split_model: Path) -> None:
    with Weights(split_model, CPU, torch.float32) as weights:
        kept = weights.read("b")
    for file in split_model.iterdir():
        file.unlink()
    assert torch.equal(kept, torch.ones(2, 2))


def test_missing_file_is_named(split_model: Path) -> None:
    (split_model / "model-2.safetensors").unlink()
    with pytest.raises(Incompatible, match=r" lacks model-2\.safetensors$"):
        weight_files(split_model)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r" lacks safetensors files$"):
        weight_files(tmp_path)


def test_truncated_file_is_named(split_model: Path) -> None:
    file = split_model / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(Incompatible, match=r"model-1\.safetensors is no whole safetensors file: "):
        Weights(split_model, CPU, torch.float32)
