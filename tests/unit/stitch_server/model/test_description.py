"""A model's description: sizes, end tokens, parameter counts, and a fingerprint that is the same on every machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stitch.errors import Incompatible
from stitch_server.model.description import ModelDescription, ParameterCount, read_config, revision
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


def changed(folder: Path, **fields: Any) -> Path:
    """Changes fields of the folder's config.json; a field that becomes ... is left out."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def changed_tensors(folder: Path, **tensors: Tensor | None) -> Path:
    """Replaces tensors by their names with _ for dots; None leaves one out."""
    file = folder / "model.safetensors"
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {**load_file(file), **new}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file)
    return folder


QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT_LENGTH}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (QWEN_YARN, 4 * CONTEXT_LENGTH),
        (QWEN_YARN | {"original_max_position_embeddings": 512, "factor": 2.5}, 1280),
        ({"type": "yarn", "factor": 2.0}, 2 * CONTEXT_LENGTH),
        ({"rope_type": "linear", "factor": 4.0}, CONTEXT_LENGTH),
        (None, CONTEXT_LENGTH),
    ],
)
def test_context_of_yarn_is_the_original_one_times_the_factor(
    folder: Path, rope: dict[str, Any] | None, expected: int
) -> None:
    changed(folder, rope_parameters=..., rope_theta=1e6, rope_scaling=rope)
    assert ModelDescription.read(folder, "x").context_length == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', which is none of arcee, "),
        ({"model_type": "olmo3"}, "model_type is 'olmo3', which is none of arcee, "),
        ({"model_type": None}, "model_type is None, which is none of arcee, "),
        ({"model_type": ["llama"]}, "model_type is ['llama'], which is none of arcee, "),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}: quantized"),
        ({"compression_config": {"a": 1}}, "compression_config is {'a': 1}: quantized"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights is 'x.safetensors': weights of another name"),
        ({"is_causal": False}, "is_causal is false"),
        ({"hidden_act": "gulu"}, "hidden_act is 'gulu'"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, which is no multiple of num_key_value_heads 4"),
        ({"num_key_value_heads": 0}, "num_attention_heads is 6, which is no multiple of num_key_value_heads 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be at least 1"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention', but sliding_window is null"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types has 'linear_attention', which is none of"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        ({"hidden_size": "48"}, "Validation error for field 'hidden_size'"),
        ({"hidden_size": -48}, "a qwen3 with rope_parameters "),
        ({"num_hidden_layers": 0, "layer_types": ...}, "num_hidden_layers is 0, for 36 tensors in all"),
        ({"num_hidden_layers": 10**4, "layer_types": ...}, "num_hidden_layers is 10000, for 36 tensors in all"),
        ({"num_hidden_layers": None}, "Validation error for field 'num_hidden_layers'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}}, "rope_parameters "),
        ({"rope_parameters": QWEN_YARN | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_field_that_no_layers_compute_is_refused_by_name(folder: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Incompatible) as refused:
        ModelDescription.read(changed(folder, **fields), "x")
    assert str(refused.value).startswith(f"{folder / 'config.json'}")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lm_head__weight": None}, "tensor lm_head.weight is not in "),
        ({"model__norm__weight": torch.ones(47)}, "tensor model.norm.weight of "),
        (
            {"lm_head__weight": torch.ones(TOKENS + 4, 48)},
            f"is [{TOKENS + 4}, 48], but config.json means [",
        ),
        ({"model__norm__bias": torch.ones(48)}, "holds model.norm.bias, which a qwen3 with this config.json does not"),
        ({"lm_head__weight_scale": torch.ones(1), "lm_head__zero": torch.ones(1)}, "lm_head.weight_scale and 1 more"),
        ({"lm_head__qweight": torch.ones(3, dtype=torch.int32)}, "lm_head.qweight of "),
        ({"lm_head__weight": torch.ones(TOKENS + 5, 48).to(torch.float8_e5m2)}, "is stored as F8_E5M2, not as F64, "),
        ({"lm_head__weight": torch.ones(TOKENS + 5, 48, dtype=torch.uint8)}, "is stored as U8, not as F64, "),
    ],
)
def test_tensor_that_the_config_does_not_describe_is_refused_by_name(
    folder: Path, tensors: dict[str, Tensor | None], reason: str
) -> None:
    with pytest.raises(Incompatible) as refused:
        ModelDescription.read(changed_tensors(folder, **tensors), "x")
    assert reason in str(refused.value)


def test_rotations_of_old_checkpoints_are_ignored_as_transformers_does(folder: Path) -> None:
    changed_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert ModelDescription.read(folder, "x").layers == 3


@pytest.mark.parametrize("family", ["llama", "custom"])
def test_code_of_the_folder_is_neither_asked_for_nor_run(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    write_tiny_model(folder, layers=1)
    (folder / "code.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n")
    changed(folder, model_type=family, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    if family == "llama":
        assert ModelDescription.read(folder, "x").layers == 1
    else:
        with pytest.raises(Incompatible, match="model_type is 'custom'"):
            ModelDescription.read(folder, "x")
    assert not (folder / "was-run").exists()


def test_dtype_of_the_config_has_no_meaning(folder: Path) -> None:
    assert read_config(changed(folder, dtype="no such type")).hidden_size == 48


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
