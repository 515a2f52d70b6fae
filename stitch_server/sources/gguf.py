"""Converts a GGUF file to a model folder with names of `transformers`, the same bytes on every machine.

Weights are stored as float32, since no smaller type holds a dequantized value (an integer of 4 to 8 bits times a
float16 scale, plus a float16 minimum) exactly, so the folder is the same model as the GGUF file.
Keys and names of tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from stitch.errors import Incompatible
from stitch_server.model.weights import INDEX_FILE
from stitch_server.sources import Progress

# The size of a safetensors file, which is built in memory.
FILE_BYTES = 1 << 30
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Tensors by their name in the file: the name in `transformers`, the shape, the one family that has it.
OUTSIDE_LAYERS = {
    "token_embd.weight": ("model.embed_tokens.weight", "vocab hidden", ""),
    "output_norm.weight": ("model.norm.weight", "hidden", ""),
    "output.weight": ("lm_head.weight", "vocab hidden", ""),
}
IN_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden", ""),
    "attn_q.weight": ("self_attn.q_proj.weight", "query hidden", ""),
    "attn_k.weight": ("self_attn.k_proj.weight", "key hidden", ""),
    "attn_v.weight": ("self_attn.v_proj.weight", "key hidden", ""),
    "attn_q.bias": ("self_attn.q_proj.bias", "query", "qwen2"),
    "attn_k.bias": ("self_attn.k_proj.bias", "key", "qwen2"),
    "attn_v.bias": ("self_attn.v_proj.bias", "key", "qwen2"),
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "head", "qwen3"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "head", "qwen3"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden query", ""),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "hidden", ""),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "intermediate hidden", ""),
    "ffn_up.weight": ("mlp.up_proj.weight", "intermediate hidden", ""),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden intermediate", ""),
}
# Values that change no result, and the keys that may have no other; `*` is the family.
NEUTRAL = (
    ("model", "general.type"),
    (2, "general.quantization_version"),
    (0, "split.no *.expert_count *.expert_used_count *.attn_logit_softcapping *.final_logit_softcapping"),
    (1, "split.count *.embedding_scale *.residual_scale *.logit_scale *.rope.scaling.attn_factor"),
    (True, "*.attention.causal"),
    (False, "tokenizer.ggml.add_eos_token tokenizer.ggml.add_sep_token tokenizer.ggml.add_space_prefix"),
)
# Keys of single tokens and of further templates are read by those who use them; scores are no part of a BPE.
HARMLESS = re.compile(r"tokenizer\.(chat_template|ggml\.(scores$|\w+_token_id$))|\w+\.rope\.scaling\.finetuned$")
# Token types of the `tokenizer.ggml.token_type` array
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
SPLITTINGS = ("gpt-2", "qwen2", "smollm")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def import_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Writes config.json, the weights and the tokenizer's files into an existing folder.

    Raises Incompatible if the file can't be read, or has a key or a tensor that would change results and is unknown.
    """
    progress(f"reading {path.name}", 0.0)
    file = GgufFile(path)
    write_json(folder / "config.json", file.config)
    write_tokenizer(file, folder)
    file.refuse_unread_keys()
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


class GgufFile:
    """An open GGUF file of a family in `ARCHITECTURES`, whose metadata and tensors fit together.

    It records the keys that are read, since one that nobody reads may change results.
    """

    def __init__(self, path: Path) -> None:
        """Raises Incompatible, which names the key or the tensor that is unknown, missing or doesn't fit."""
        self.path, self._reader = path, _open(path)
        self._read: set[str] = set()
        self.family = self.value("general.architecture")
        for neutral, keys in NEUTRAL:
            for key in keys.replace("*", str(self.family)).split():
                self._require(key, neutral)
        if self.family not in ARCHITECTURES:
            raise Incompatible(f"{path.name} is a {self.family}; GGUF is read for {', '.join(ARCHITECTURES)} alone")
        # The fields of config.json.
        self.config = self._config()
        self._hub_names = self._check_tensors()

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a value of the file's metadata."""
        self._read.add(key)
        field = self._reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except (ValueError, LookupError) as error:
            raise Incompatible(f"{self.path.name}: {key} can't be read: {error}") from error

    def number(self, key: str, default: float | None = None, least: float = 1e-30) -> float:
        """Returns a finite number; a float32 as its authors wrote it."""
        value = self.value(key, default)
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise self.refused(key, f"it must be a number of at least {least:g}")
        return value if type(value) is int else _shortest_decimal(value)

    def size(self, key: str, default: int | None = None) -> int:
        """Returns an integer above 0 of the family's keys."""
        value = self.value(f"{self.family}.{key}", default)
        if type(value) is not int or value < 1:
            raise self.refused(f"{self.family}.{key}", "it must be an integer above 0")
        return value

    def array(self, key: str, kind: type) -> list[Any]:
        """Returns an array of one kind."""
        values = self.value(key)
        if not isinstance(values, list) or not values or not isinstance(values[0], kind):
            raise self.refused(key, f"it must be an array of {kind.__name__}")
        return values

    def refused(self, key: str, reason: str) -> Incompatible:
        """Returns the error that names the key and its value."""
        value = self.value(key)
        found = "missing" if value is None else reprlib.repr(value)
        return Incompatible(f"{self.path.name}: {key} is {found}; {reason}")

    def refuse_unread_keys(self) -> None:
        """Raises Incompatible for a key of the family or of the tokenizer that nobody has read."""
        for key in self._reader.fields:
            owner = key.split(".")[0]
            if owner in (self.family, "tokenizer") and key not in self._read and not HARMLESS.match(key):
                raise self.refused(key, "this key isn't supported")

    def _require(self, key: str, supported: Any) -> None:
        if self.value(key, supported) != supported:
            raise self.refused(key, f"supported is {supported}")

    def _config(self) -> dict[str, Any]:
        family, heads, hidden_size = self.family, self.size("attention.head_count"), self.size("embedding_length")
        head_dim, context_length = self.size("attention.key_length", hidden_size // heads), self.size("context_length")
        vocab_size = len(self.array("tokenizer.ggml.tokens", str))
        self._require(f"{family}.vocab_size", vocab_size)
        self._require(f"{family}.rope.dimension_count", head_dim)
        self._require(f"{family}.attention.value_length", head_dim)
        self._require(f"{family}.attention.scale", float(np.float32(head_dim**-0.5)))
        # A window at least as long as the context changes nothing.
        self.number(f"{family}.attention.sliding_window", context_length, least=context_length)
        return {
            "architectures": [ARCHITECTURES[family]],
            "model_type": family,
            "hidden_size": hidden_size,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": self.size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context_length,
            "rms_norm_eps": self.number(f"{family}.attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(f"{family}.rope", context_length),
            "tie_word_embeddings": "output.weight" not in (tensor.name for tensor in self._reader.tensors),
            "vocab_size": vocab_size,
            "dtype": "float32",
        }

    def _rope(self, rope: str, context_length: int) -> dict[str, Any]:
        """A factor without a type is linear, as in llama.cpp, whose formulas are those of `transformers`."""
        kind = self.value(f"{rope}.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn"):
            raise self.refused(f"{rope}.scaling.type", "supported is none, linear or yarn")
        factor = self.number(f"{rope}.scaling.factor", self.number(f"{rope}.scale_linear", 1.0, least=1), least=1)
        theta = {"rope_theta": self.number(f"{rope}.freq_base", 10000.0)}
        yarn = {
            "original_max_position_embeddings": self.size("rope.scaling.original_context_length", context_length),
            "beta_fast": self.number(f"{rope}.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number(f"{rope}.scaling.yarn_beta_slow", 1.0),
        }
        if kind == "none" or factor == 1:
            return {"rope_type": "default", **theta}
        return {"rope_type": kind, "factor": factor, **theta, **(yarn if kind == "yarn" else {})}

    def _check_tensors(self) -> dict[str, str]:
        """Returns the name in `transformers` of every tensor; all are there, with the shapes that the config says."""
        shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in self._reader.tensors}
        self._require("split.tensors.count", len(shapes))
        if self.config["num_hidden_layers"] > len(shapes):
            raise self.refused(f"{self.family}.block_count", f"the file has {len(shapes)} tensors")
        known = _known_tensors(self.config)
        for name in [*known, *shapes]:
            expected = known[name][1] if name in known else "none"
            if shapes.get(name) != expected:
                found = f"tensor {name} is {shapes.get(name, 'missing')}"
                raise Incompatible(f"{self.path.name}: {found}; a {self.family} with these metadata has {expected}")
        return {name: hub_name for name, (hub_name, _) in known.items()}

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yields every tensor with its name in `transformers`, dequantized, one at a time."""
        for tensor in self._reader.tensors:
            yield self._hub_names[tensor.name], self._dequantize(tensor)

    def tensor_bytes(self) -> list[int]:
        """Returns the size of every tensor as float32, in the order of `tensors`."""
        return [4 * int(tensor.n_elements) for tensor in self._reader.tensors]

    def _dequantize(self, tensor: ReaderTensor) -> NDArray[np.float32]:
        try:
            rows: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise Incompatible(f"{self.path.name}: {tensor.name} is {tensor.tensor_type.name}: {error}") from error
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
        if self.family == "llama" and heads:
            rows = _undo_permutation(rows, self.config[heads])
        return np.ascontiguousarray(rows, dtype=np.float32)


class _Reader(GGUFReader):
    """A reader that stops at the file's end, where GGUFReader would go on as long as a damaged array's length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        # A view of a memmap takes several times as long as one of an array.
        self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"it has {self.data.size} bytes, and {count} values at byte {offset} are missing")
        return values


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != b"GGUF" or len(head) < 8:
        raise Incompatible(f"{path.name} is no GGUF file: it begins with {head!r}")
    version = int.from_bytes(head[4:], "little")
    if version not in (2, 3):
        found = f"of version {version}" if version < 1 << 16 else "big-endian"
        raise Incompatible(f"{path.name} is {found}; GGUF is read little-endian, of version 2 or 3")
    try:
        return _Reader(path)
    except (ValueError, OSError, LookupError, OverflowError) as error:
        raise Incompatible(f"{path.name} is a truncated or damaged GGUF file: {error}") from error


def _known_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the name in `transformers` and the shape of each tensor that the model has, by its name in the file."""
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "head": config["head_dim"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "key": config["num_key_value_heads"] * config["head_dim"],
    }
    known = dict(OUTSIDE_LAYERS)
    if config["tie_word_embeddings"]:
        del known["output.weight"]
    for layer in range(config["num_hidden_layers"]):
        for name, (hub_name, shape, family) in IN_LAYER.items():
            known[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{hub_name}", shape, family
    return {
        name: (hub_name, tuple(sizes[size] for size in shape.split()))
        for name, (hub_name, shape, family) in known.items()
        if family in ("", config["model_type"])
    }


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
    tokens = file.array("tokenizer.ggml.tokens", str)
    _tokenizer(file, tokens).save(str(folder / "tokenizer.json"))
    special = {name: _token_id(file, key) for name, key in SPECIAL.items()}
    config = {name: tokens[token_id] for name, token_id in special.items() if token_id is not None}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    length = file.config["max_position_embeddings"]
    write_json(folder / "tokenizer_config.json", {**fixed, **config, "model_max_length": length})
    template = file.value("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise file.refused("tokenizer.chat_template", "it must be a text")
    write_json(folder / "generation_config.json", _generation_config(file, tokens, template))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes the same bytes for the same fields."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    for key, supported in (("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", SPLITTINGS)):
        if file.value(key) not in supported:
            raise file.refused(key, f"supported is {' or '.join(supported)}")
    kinds = file.array("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise file.refused("tokenizer.ggml.token_type", f"it has {len(kinds)} entries for {len(tokens)} tokens")
    # Padding of the embedding is no token: two models of a pair may be padded differently.
    used = [token_id for token_id, kind in enumerate(kinds) if kind != UNUSED]
    vocabulary = {tokens[token_id]: token_id for token_id in used}
    if len(vocabulary) != len(used):
        raise file.refused("tokenizer.ggml.tokens", "a token must not occur twice")
    merges = [tuple(merge.split(" ", 1)) for merge in file.array("tokenizer.ggml.merges", str)]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    # The library raises instances of Exception itself.
    except Exception as error:
        raise file.refused("tokenizer.ggml.merges", str(error)) from error
    _split_as(tokenizer, file.value("tokenizer.ggml.pre"))
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    _add_first_token(tokenizer, file, tokens)
    return tokenizer


def _add_first_token(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """A plain prompt begins with the model's first token where `add_bos_token` says so."""
    if file.value("tokenizer.ggml.add_bos_token", False) is False:
        return
    first = _token_id(file, "bos")
    if first is None or file.value("tokenizer.ggml.add_bos_token") is not True:
        raise file.refused("tokenizer.ggml.add_bos_token", "it needs to be true or false, and a bos_token_id")
    begin = [(tokens[first], first)]
    tokenizer.post_processor = processors.TemplateProcessing(single=[tokens[first], "$A"], special_tokens=begin)


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


def _generation_config(file: GgufFile, tokens: list[str], template: str) -> dict[str, Any]:
    """An answer ends at the end of text or turn, and at padding, which is never part of an answer."""
    ends = [_token_id(file, key) for key in ("eos", "eot", "eom", "padding")]
    if "<|im_end|>" in template and "<|im_end|>" in tokens:
        ends.append(tokens.index("<|im_end|>"))
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def _token_id(file: GgufFile, kind: str) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    token_id = file.value(key)
    if token_id is not None and (type(token_id) is not int or not 0 <= token_id < file.config["vocab_size"]):
        raise file.refused(key, f"the file has {file.config['vocab_size']} tokens")
    return token_id
