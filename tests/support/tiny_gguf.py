"""Writes a tiny model folder as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.byte_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer

_PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL, NORMAL, UNUSED = 3, 1, 5


def write_tiny_gguf(
    file: Path,
    model: Path,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    splitting: str = "smollm",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """`metadata` and `tensors` replace, add or, with None, leave out. Matrices are quantized, vectors stay float32."""
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(file, config["model_type"])
    for key, value in {**_sizes(config), **_tokenizer(config["vocab_size"], splitting), **(metadata or {})}.items():
        _add(writer, key, value)
    stored: dict[str, NDArray[np.float32] | None] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        stored[_gguf_name(name)] = _interleaved(name, tensor, config) if config["model_type"] == "llama" else tensor
    for name, given in (stored | (tensors or {})).items():
        if given is not None:
            kind = GGMLQuantizationType.F32 if given.ndim == 1 else quantization
            writer.add_tensor(name, quantize(given, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    family = config["model_type"]
    sizes = {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    return {f"{family}.{key}": config[name] for key, name in sizes.items()} | {
        f"{family}.rope.freq_base": config["rope_parameters"]["rope_theta"]
    }


def _tokenizer(rows: int, splitting: str) -> dict[str, Any]:
    fields = json.loads(byte_tokenizer().to_str())
    tokens = sorted(fields["model"]["vocab"], key=fields["model"]["vocab"].__getitem__)
    kinds = [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens]
    padding = [f"[PAD{at}]" for at in range(len(tokens), rows)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": kinds + [UNUSED] * len(padding),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif value is not None:
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{_PLACES[rest]}.{kind}"
    return f"{_PLACES[module]}.{kind}"


def _interleaved(name: str, tensor: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """llama.cpp keeps the two values that a rotation mixes side by side."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
