"""A model's description: sizes, end tokens, parameter counts, and a fingerprint that is the same on every machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription, ParameterCount, revision
from stitch_server.model.weights import INDEX_FILE
from tests.support.tiny_model import CONTEXT_LENGTH, NATIVE_FAMILIES, TOKENS, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen3", layers=3, hidden_size=48, heads=6, padding_rows=5)


def test_sizes_are_read_from_the_config(folder: Path) -> None:
    described = ModelDescription.read(folder, "tiny/model")
    assert (described.id, described.architecture, described.layers) == ("tiny/model", "qwen3", 3)
    assert (described.hidden_size, described.heads, described.kv_heads, described.head_dim) == (48, 6, 2, 8)
    assert (described.vocabulary_size, described.context_length) == (TOKENS + 5, CONTEXT_LENGTH)


@pytest.mark.parametrize("missing", ["head_dim", "num_key_value_heads"])
def test_sizes_missing_in_the_config_follow_from_others(tmp_path: Path, missing: str) -> None:
    folder = write_tiny_model(tmp_path, "qwen2", heads=4, kv_heads=4)
    config = json.loads((folder / "config.json").read_text())
    config[missing] = None
    (folder / "config.json").write_text(json.dumps(config))
    described = ModelDescription.read(folder, "x")
    assert (described.kv_heads, described.head_dim) == (4, 8)


def test_proto_has_the_same_fields(folder: Path) -> None:
    described = ModelDescription.read(folder, "tiny/model")
    message = described.to_proto()
    for field in message.DESCRIPTOR.fields:
        assert getattr(message, field.name) == getattr(described, field.name)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"has no config\.json, so it is no model folder"):
        ModelDescription.read(tmp_path, "x")


class TestRevision:
    def test_is_equal_for_equal_weights(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "copy")
        assert revision(tmp_path / "copy") == revision(folder)
        assert len(revision(folder)) == 16

    def test_does_not_depend_on_the_split_into_files(self, folder: Path) -> None:
        before, tensors = revision(folder), load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"two.safetensors": names[::2], "one.safetensors": names[1::2]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        weight_map = {name: file for file, held in parts.items() for name in held}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
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
    def test_changes_with_a_tensor(self, folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
        before, file = revision(folder), folder / "model.safetensors"
        save_file(dict(change(name, tensor) for name, tensor in load_file(file).items()), file)
        assert revision(folder) != before

    def test_differs_between_seeds(self, tmp_path: Path) -> None:
        made = [revision(write_tiny_model(tmp_path / str(seed), layers=1, seed=seed)) for seed in (0, 1)]
        assert made[0] != made[1]

    def test_is_equal_for_the_same_seed(self, tmp_path: Path) -> None:
        torch.manual_seed(99)
        made = [revision(write_tiny_model(tmp_path / name, layers=1)) for name in "ab"]
        assert made[0] == made[1]


class TestParameterCount:
    @pytest.mark.parametrize(
        ("family", "tied"), [(family, index % 2 == 0) for index, family in enumerate(NATIVE_FAMILIES)]
    )
    def test_layers_and_head_sum_up_to_all_parameters(self, tmp_path: Path, family: str, tied: bool) -> None:
        folder = write_tiny_model(tmp_path / family, family, layers=3, tie_word_embeddings=tied)
        count = ParameterCount.read(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert count.layers == tuple(sum(one.numel() for one in layer.parameters()) for layer in model.model.layers)
        assert count.head == model.lm_head.weight.numel() + model.model.norm.weight.numel()
        embedding = 0 if tied else model.model.embed_tokens.weight.numel()
        assert sum(count.layers) + count.head + embedding == model.num_parameters()

    def test_between_sums_up_a_range_of_layers(self) -> None:
        count = ParameterCount(layers=(1, 10, 100, 1000), head=5)
        assert [count.between(0, 4), count.between(1, 3), count.between(2, 2)] == [1111, 110, 0]

    def test_weights_in_several_files_count_together(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "model", layers=2)
        whole = ParameterCount.read(folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert ParameterCount.read(folder) == whole

    def test_only_the_header_is_read(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "model", layers=2)
        whole = ParameterCount.read(folder)
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
        assert ParameterCount.read(folder) == whole

    def test_unknown_tensor_counts_nothing(self, tmp_path: Path) -> None:
        folder = write_tiny_model(tmp_path / "model", layers=2)
        whole = ParameterCount.read(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "other.weight": torch.zeros(50)}, folder / "model.safetensors")
        assert ParameterCount.read(folder) == whole
