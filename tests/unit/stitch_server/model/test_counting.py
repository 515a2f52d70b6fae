"""Parameters are those that `transformers` counts, place by place, and no weight is read for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stitch_server.model.counting import ParameterCount
from tests.support.tiny_model import LEAN_FAMILIES, write_tiny_model


@pytest.mark.parametrize("family", LEAN_FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_place(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / family, family, layers=3, tie_word_embeddings=tied)
    count = ParameterCount.read(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert count.layers == tuple(sum(one.numel() for one in layer.parameters()) for layer in model.model.layers)
    assert count.head == model.lm_head.weight.numel() + model.model.norm.weight.numel()
    embedding = 0 if tied else model.model.embed_tokens.weight.numel()
    assert sum(count.layers) + count.head + embedding == model.num_parameters()


def test_a_range_of_layers_is_summed_up() -> None:
    count = ParameterCount(layers=(1, 10, 100, 1000), head=5)
    assert [count.between(0, 4), count.between(1, 3), count.between(2, 2)] == [1111, 110, 0]


def test_weights_in_several_files_count_together(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=2)
    whole = ParameterCount.read(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert ParameterCount.read(folder) == whole


def test_the_weights_themselves_are_not_needed(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=2)
    whole = ParameterCount.read(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    assert ParameterCount.read(folder) == whole


def test_a_tensor_without_a_place_counts_nothing(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=2)
    whole = ParameterCount.read(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "other.weight": torch.zeros(50)}, folder / "model.safetensors")
    assert ParameterCount.read(folder) == whole
