"""Writes the tokenizer of a GGUF file as the files that `tokenizers` and `transformers` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from stitch.errors import Incompatible
from stitch_server.sources.gguf_tensors import GgufFile

# Token types of the `tokenizer.ggml.token_type` array: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


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
        (folder / "chat_template.jinja").write_text(template)


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
