"""Converts a GGUF file to a model folder with names of `transformers`, the same bytes on every machine.

Weights are stored as float32, since no smaller type holds a dequantized value (an integer of 4 to 8 bits times a
float16 scale, plus a float16 minimum) exactly, so the folder is the same model as the GGUF file.
Keys and names of tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from stitch.errors import Incompatible
from stitch_server.model.weights import INDEX_FILE
from stitch_server.sources import Progress

# The size of a safetensors file, which is built in memory.
FILE_BYTES = 1 << 30
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
# Token types of the `tokenizer.ggml.token_type` array
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def import_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Writes config.json, the weights and the tokenizer's files into an existing folder.

    Raises Incompatible if the file can't be read.
    """
    progress(f"reading {path.name}", 0.0)
    file = GgufFile.open(path)
    config = file.config()
    write_json(folder / "config.json", config)
    write_tokenizer(file, folder)
    _write_weights(file, folder, progress)


def _write_weights(file: GgufFile, folder: Path, progress: Progress) -> None:
    sizes = file.tensor_bytes()
    tensors = file.tensors()
    done = 0
    file_of: dict[str, str] = {}
    counts = tensors_per_file(sizes, FILE_BYTES)
    for number, count in enumerate(counts, start=1):
        name = "model.safetensors" if len(counts) == 1 else f"model-{number:05d}-of-{len(counts):05d}.safetensors"
        tensors_of_file: dict[str, NDArray[np.float32]] = {}
        for tensor_name, tensor in islice(tensors, count):
            tensors_of_file[tensor_name] = tensor
            done += tensor.nbytes
            progress(f"importing {file.path.name}", done / sum(sizes))
        save_file(tensors_of_file, folder / name, metadata={"format": "pt"})
        # safetensors makes a file that only its owner reads.
        (folder / name).chmod(0o644)
        file_of.update(dict.fromkeys(tensors_of_file, name))
    if len(counts) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of})


def tensors_per_file(sizes: list[int], limit: int) -> list[int]:
    """Returns the number of consecutive tensors of each file; no file exceeds the limit by more than one tensor."""
    files = [end // limit for end in accumulate(sizes, initial=0)][:-1]
    return [files.count(number) for number in sorted(set(files))]


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


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Raises Incompatible for a tokenizer other than the byte-level BPE of GPT-2, SmolLM and Qwen.
    """
    tokens = file.value("tokenizer.ggml.tokens")
    _tokenizer(file, tokens).save(str(folder / "tokenizer.json"))
    special = {name: _token_id(file, key) for name, key in SPECIAL.items()}
    config = {name: tokens[token_id] for name, token_id in special.items() if token_id is not None}
    length = file.value(f"{file.value('general.architecture')}.context_length")
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**fixed, **config, "model_max_length": length})
    write_json(folder / "generation_config.json", _generation_config(file, tokens))
    template = file.value("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes the same bytes for the same fields."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    kind, splitting = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or splitting not in ("gpt-2", "smollm", "qwen2"):
        raise Incompatible(f"{file.path.name} has the tokenizer {kind} ({splitting}); import that model's safetensors")
    kinds = file.value("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    # Padding of the embedding is no token: two models of a pair may be padded differently.
    vocabulary = {token: at for at, token in enumerate(tokens) if kinds[at] != UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    _split_as(tokenizer, splitting)
    tokenizer.add_tokens(added)
    return tokenizer


def _split_as(tokenizer: Tokenizer, splitting: str) -> None:
    """Sets the steps before the merges, as in the family's own tokenizer.json."""
    steps: list[Any] = []
    if splitting == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")]
    if splitting == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting != "qwen2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()


def _generation_config(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    """An answer ends at the end of text or turn, and at padding, which is never part of an answer."""
    ends = [_token_id(file, key) for key in ("eos", "eot", "eom", "padding")]
    if "<|im_end|>" in file.value("tokenizer.chat_template", ""):
        ends.append(tokens.index("<|im_end|>"))
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def _token_id(file: GgufFile, kind: str) -> int | None:
    token_id: int | None = file.value(f"tokenizer.ggml.{kind}_token_id")
    return token_id
