"""Configurations of native layers are those that `transformers` reads from the same file, with the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from stitch_server.model import hf_layers
from stitch_server.model.llama_config import FAMILIES, LlamaConfig

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
SLIDING, FULL = "sliding_attention", "full_attention"
# Fields that are added to those above; ... leaves one out.
READ: list[tuple[str, dict[str, Any]]] = [
    *((family, DEFAULT_ROPE) for family in FAMILIES),
    *((family, {"rope_theta": 5e5, "rope_scaling": None}) for family in FAMILIES),
    *((family, DEFAULT_ROPE | {"attention_bias": True, "mlp_bias": True}) for family in FAMILIES),
    *((family, DEFAULT_ROPE | {"head_dim": ...}) for family in ("llama", "qwen2", "mistral")),
    ("llama", DEFAULT_ROPE | {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mistral", DEFAULT_ROPE | {"sliding_window": 7, "hidden_size": 50}),
    ("llama", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True}),
    ("qwen2", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": False}),
    ("qwen2", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True}),
    ("qwen3", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL]}),
    ("qwen3", DEFAULT_ROPE | {"layer_types": [FULL] * 3}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}),
    ("llama", {"rope_parameters": LLAMA3 | {"type": "llama3", "rope_theta": 10**6}}),
    ("llama", {"rope_theta": 10**4, "rope_scaling": {"type": "linear", "factor": 2}}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN}),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 9}},
    ),
    ("llama", DEFAULT_ROPE | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}),
    ("qwen2", DEFAULT_ROPE | {"use_mrope": False, "max_window_layers": 28, "eos_token_id": [1, 2]}),
]
# Fields with which a file is left to `transformers`, whether it refuses them, fills in a default or ignores them.
LEFT: list[tuple[str, dict[str, Any]]] = [
    *(("llama", {name: ...}) for name in SIZES if name not in ("head_dim", "sliding_window")),
    *(("llama", {name: "8"}) for name in SIZES),
    *(("llama", {name: -8}) for name in SIZES if name != "rms_norm_eps"),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"hidden_size": 50}),
    ("llama", {"head_dim": 7}),
    ("llama", {"pad_token_id": 300}),
    ("llama", {"num_hidden_layers": True}),
    ("llama", {"layer_types": [FULL] * 3}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"anything_else": 1}),
    ("mistral", {"sliding_window": ...}),
    ("qwen3", {"head_dim": ...}),
    ("qwen2", {"layer_types": [FULL] * 4}),
    ("qwen2", {"layer_types": ["linear_attention"] * 3}),
    ("qwen2", {"layer_types": [SLIDING] * 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 0}),
    ("llama", {"rope_parameters": ...}),
    ("llama", {"rope_parameters": {}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default"}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": None}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]


def config_of(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    fields = SIZES | {"model_type": family} | changes
    return {name: value for name, value in fields.items() if value is not ...}


@pytest.mark.parametrize(("family", "changes"), READ, ids=str)
def test_read_configuration_is_that_of_transformers(family: str, changes: dict[str, Any]) -> None:
    fields = config_of(family, changes)
    theirs = CONFIG_MAPPING[family].from_dict(fields)
    read = LlamaConfig.read(fields)
    assert read is not None
    assert read == LlamaConfig.of(theirs)
    assert read.tensor_shapes() == hf_layers.tensor_shapes(theirs)


@pytest.mark.parametrize(("family", "changes"), LEFT, ids=str)
def test_file_with_another_field_or_value_is_left_to_transformers(family: str, changes: dict[str, Any]) -> None:
    assert LlamaConfig.read(config_of(family, DEFAULT_ROPE)) is not None
    assert LlamaConfig.read(config_of(family, DEFAULT_ROPE | changes)) is None


def test_window_is_that_of_a_layer() -> None:
    fields = config_of(
        "qwen2", DEFAULT_ROPE | {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    )
    read = LlamaConfig.read(fields)
    assert read is not None
    assert [read.window(layer) for layer in range(3)] == [None, 7, 7]
