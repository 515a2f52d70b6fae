"""Tensors are read from a folder's files, and missing files and tensors are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stitch.errors import Incompatible
from stitch_server.model.weights import INDEX_FILE, Weights, stored_tensors, weight_files
from tests.support.whole_model import CPU

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def header(**fields: object) -> bytes:
    """A safetensors file of one tensor of which there is only the header."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}).encode()
    return len(text).to_bytes(8, "little") + text


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
    with pytest.raises(Incompatible, match=r" lacks model-2\.safetensors, which .*index\.json names$"):
        weight_files(split_model)


@pytest.mark.parametrize("stray", [(), ("pytorch_model.bin",), ("other.safetensors", "adapter_model.safetensors")])
def test_folder_without_weights_of_transformers_is_refused(tmp_path: Path, stray: tuple[str, ...]) -> None:
    for name in stray:
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(Incompatible, match=r" has neither model\.safetensors nor model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def test_stray_files_beside_the_single_file_are_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    for name in ("a.safetensors", "model-00001-of-00002.safetensors", "z.safetensors"):
        save_file({"a": torch.zeros(3), "b": torch.zeros(1)}, tmp_path / name)
    with Weights(tmp_path, CPU, torch.float32) as weights:
        assert "b" not in weights
        assert torch.equal(weights.read("a"), torch.arange(3.0))


def test_single_file_takes_precedence_over_a_stale_index(split_model: Path) -> None:
    save_file({"a": torch.full((3,), 7.0)}, split_model / "model.safetensors")
    assert weight_files(split_model) == [split_model / "model.safetensors"]


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_index_without_files_is_refused_by_its_field(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(Incompatible, match=r"index\.json: weight_map must give every tensor's file"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LFS_POINTER, "can't be read: it is a Git LFS pointer"),
        ("", "can't be read: "),
        ('{"weight_map": ', "can't be read: "),
        ("[" * 100_000, "can't be read: "),
        ("[1]", "holds no object, but list"),
    ],
    ids=["pointer", "empty", "cut", "nested", "list"],
)
def test_broken_index_is_refused_with_the_reason(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(Incompatible, match=rf"model\.safetensors\.index\.json {reason}"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LFS_POINTER.encode(), "is a Git LFS pointer, and the file itself was not downloaded"),
        (b"", "is no whole safetensors file: it is empty"),
        (b"\x04", "is no whole safetensors file: its header is broken"),
        (b"\xff" * 100, "is no whole safetensors file: its header is broken"),
        (b"\x02" + bytes(7) + b"[]", "is no whole safetensors file: its header is broken"),
        (b"\x08" + bytes(7) + b'{"a": 1}', "is no whole safetensors file: its header is broken"),
        (header(data_offsets=[-99, 4]), "is no whole safetensors file: its header is broken"),
        (header(data_offsets=[0, 10**30]), "is no whole safetensors file: its header is broken"),
        (header(data_offsets=["0", 4]), "is no whole safetensors file: its header is broken"),
        (b"<html>404 not found</html>", "is no whole safetensors file: its header is broken"),
    ],
)
def test_file_that_is_no_safetensors_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Incompatible, match=rf"model\.safetensors {reason}"):
        Weights(tmp_path, CPU, torch.float32)
    with pytest.raises(Incompatible, match=rf"model\.safetensors {reason}"):
        stored_tensors(tmp_path)


def test_truncated_file_is_named(split_model: Path) -> None:
    file = split_model / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(Incompatible, match=r"model-1\.safetensors is no whole safetensors file: "):
        Weights(split_model, CPU, torch.float32)
