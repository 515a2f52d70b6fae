"""Reads the weights and sizes of a GGUF file, under the names of `transformers`.

Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from stitch.errors import Incompatible

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file of a family in `ARCHITECTURES`."""

    path: Path
    _reader: GGUFReader

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Raises Incompatible if it is no GGUF file, or of a family that needs more than renamed tensors."""
        try:
            file = cls(path, GGUFReader(path))
        except (ValueError, OSError, IndexError) as error:
            raise Incompatible(f"{path} is no GGUF file: {error}") from error
        architecture = file.value("general.architecture")
        if architecture not in ARCHITECTURES:
            raise Incompatible(f"{path.name} is a {architecture}; GGUF is read for {', '.join(ARCHITECTURES)} alone")
        if file.value(f"{architecture}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.names():
            raise Incompatible(f"{path.name} scales its rotary embedding; import that model from its safetensors")
        return file

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a value of the file's metadata."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def names(self) -> list[str]:
        """Returns the tensors' names in the file."""
        return [tensor.name for tensor in self._reader.tensors]

    def config(self) -> dict[str, Any]:
        """Returns the fields of config.json."""
        family = self.value("general.architecture")

        def size(key: str) -> Any:
            return self.value(f"{family}.{key}")

        heads, hidden_size = size("attention.head_count"), size("embedding_length")
        return {
            "architectures": [ARCHITECTURES[family]],
            "model_type": family,
            "hidden_size": hidden_size,
            "intermediate_size": size("feed_forward_length"),
            "num_hidden_layers": size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": size("attention.head_count_kv") or heads,
            "head_dim": size("attention.key_length") or hidden_size // heads,
            "hidden_act": "silu",
            "max_position_embeddings": size("context_length"),
            "rms_norm_eps": _shortest_decimal(size("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest_decimal(size("rope.freq_base") or 10000.0),
            "tie_word_embeddings": "output.weight" not in self.names(),
            "vocab_size": len(self.value("tokenizer.ggml.tokens")),
            "dtype": "float32",
        }

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yields every tensor with its name in `transformers`, dequantized, one at a time."""
        for tensor in self._reader.tensors:
            yield _hub_name(tensor.name), self._dequantize(tensor)

    def tensor_bytes(self) -> list[int]:
        """Returns the size of every tensor as float32, in the order of `tensors`."""
        return [4 * int(tensor.n_elements) for tensor in self._reader.tensors]

    def _dequantize(self, tensor: ReaderTensor) -> NDArray[np.float32]:
        try:
            rows: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise Incompatible(f"{self.path.name}: {tensor.name} is {tensor.tensor_type.name}: {error}") from error
        kind = tensor.name.split(".")[-2]
        if self.value("general.architecture") == "llama" and kind in ("attn_q", "attn_k"):
            heads = self.value("llama.attention.head_count" + ("_kv" if kind == "attn_k" else ""))
            rows = _undo_permutation(rows, heads or self.value("llama.attention.head_count"))
        return np.ascontiguousarray(rows, dtype=np.float32)


def _hub_name(name: str) -> str:
    """Maps `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in IN_LAYER:
        return f"model.layers.{parts[1]}.{IN_LAYER[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OUTSIDE_LAYERS:
        return f"{OUTSIDE_LAYERS[parts[0]]}.{parts[1]}"
    raise Incompatible(f"GGUF tensor {name} has no place in a Llama-like model")


def _undo_permutation(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of a Llama's query and key rows, in which a rotation's pairs are neighbours.

    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, `LlamaModel.permute`
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _shortest_decimal(value: float) -> float:
    """Returns the shortest decimal that rounds to this float32, which is what the model's authors wrote."""
    return float(str(np.float32(value)))
