"""Special tokens of any file are those of `transformers.AutoTokenizer`: ids of text, rendered chats, decoded text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from router_gateway.tokenization.chat_template import Turn
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch import tokenizer_files
from tests.support.byte_tokenizer import byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ unk_token }}"
    "{% for message in messages %}<|im_start|>{{ message.content }}{{ eos_token }}{% endfor %}"
)
TURNS = [Turn("user", "hello <tool>"), Turn("assistant", "world <new> ")]
TEXT = "<s>hello <tool> world</s><new> <|im_end|><image>the <0> <1><2>"
MARK = {"content": "<tool>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "named": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}},
    "named by nothing": {"tokenizer_config": {"bos_token": "", "eos_token": None, "pad_token": " "}},
    "named as objects": {
        "tokenizer_config": {"bos_token": {"__type": "AddedToken", **MARK}, "eos_token": "<|im_end|>"}
    },
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<tool>", "<new>", "<|im_end|>"]}},
    "extra": {
        "tokenizer_config": {"extra_special_tokens": ["<tool>", {"__type": "AddedToken", **MARK, "special": True}]}
    },
    "extra by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>"}, "eos_token": "</s>"}},
    "named by the model": {"tokenizer_config": {"image_token": "<image>", "bos_token": "<s>"}},
    "map": {"special_tokens_map": {"bos_token": "<s>", "eos_token": MARK, "additional_special_tokens": ["<new>"]}},
    "map over configuration": {
        "tokenizer_config": {"bos_token": "<a>", "additional_special_tokens": ["<new>"]},
        "special_tokens_map": {"bos_token": "<s>", "additional_special_tokens": ["<tool>"], "pad_token": "<tool>"},
    },
    "map with extra": {
        "tokenizer_config": {"extra_special_tokens": ["<new>"]},
        "special_tokens_map": {"extra_special_tokens": ["<tool>", "<new>"]},
    },
    "decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {"361": MARK | {"special": True}, "360": {"content": "<new>", "special": False}},
            "eos_token": "<new>",
        }
    },
    "decoder over map": {
        "tokenizer_config": {"added_tokens_decoder": {"360": {"content": "<new>"}}, "bos_token": "<new>"},
        "special_tokens_map": {"bos_token": "<s>"},
        "added_tokens": {"<tool>": 360},
    },
    "decoder that changes a token": {
        "tokenizer_config": {"added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": False, "lstrip": True}}}
    },
    "added": {"added_tokens": {"<tool>": 361, "<new>": 360, "<image>": 400}},
    "added and named": {
        "added_tokens": {"<tool>": 360, "</s>": 361},
        "tokenizer_config": {"eos_token": "</s>", "additional_special_tokens": ["<tool>"]},
    },
    "added and map": {"added_tokens": {"<tool>": 360}, "special_tokens_map": {"bos_token": "<tool>"}},
    "added that the vocabulary has": {"added_tokens": {"he": 300}},
    "defaults of GPT-2": {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|im_end|>"}},
    "defaults of Qwen2": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|im_start|>"}},
    "split": {"tokenizer_config": {"split_special_tokens": True, "bos_token": "<s>"}},
    "first token off": {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}},
}


def folder_of(folder: Path, files: dict[str, Any]) -> Path:
    """A model folder with these files beside tokenizer.json, by their names without the suffix."""
    folder.mkdir(exist_ok=True)
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    files = files | {"tokenizer_config": fixed | files.get("tokenizer_config", {}), "config": {"model_type": "llama"}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


def check_equal(folder: Path) -> None:
    expected, files = AutoTokenizer.from_pretrained(folder), tokenizer_files.read(folder)
    vocabulary = Vocabulary.from_files(files)
    assert vocabulary.encode(TEXT) == expected.encode(TEXT)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    assert vocabulary.template is not None
    rendered = expected.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert vocabulary.template.render(TURNS) == rendered
    assert vocabulary.encode_rendered(rendered) == expected.encode(rendered, add_special_tokens=False)
    detokenizer, ids = vocabulary.detokenizer(), [*expected.encode(TEXT), *range(len(expected))]
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.finish()
    assert text == expected.decode(ids, skip_special_tokens=True)
    assert tokenizer_files.token_count(folder) == len(expected)
    assert (expected.eos_token_id is None) or expected.eos_token_id in vocabulary.end_tokens


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    check_equal(folder_of(tmp_path / "model", CASES[name]))


@pytest.mark.parametrize("seed", range(60))
def test_random_special_tokens_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    check_equal(folder_of(tmp_path / "model", random_files(random.Random(seed))))


def random_files(draw: random.Random) -> dict[str, Any]:
    tokens = ["<s>", "</s>", "<tool>", "<new>", "<|im_end|>", "<|im_start|>", "<0>", "<1>", "he", "the"]

    def token() -> Any:
        flags = {name: draw.random() < 0.5 for name in draw.sample(tokenizer_files.FLAGS, draw.randrange(4))}
        return draw.choice([draw.choice(tokens), {"__type": "AddedToken", "content": draw.choice(tokens), **flags}])

    def named() -> dict[str, Any]:
        return {name: draw.choice(tokens) for name in draw.sample(tokenizer_files.NAMED, draw.randrange(4))}

    config = {name: token() for name in draw.sample(tokenizer_files.NAMED, draw.randrange(4))}
    if draw.random() < 0.5:
        config["additional_special_tokens"] = [draw.choice(tokens) for _ in range(draw.randrange(4))]
    files: dict[str, Any] = {"tokenizer_config": config}
    if draw.random() < 0.4:
        listed = [{"content": draw.choice(tokens), "special": draw.random() < 0.5} for _ in range(3)]
        config["added_tokens_decoder"] = {str(360 + at): one for at, one in enumerate(listed)}
    if draw.random() < 0.5:
        files["special_tokens_map"] = named()
    if draw.random() < 0.5:
        files["added_tokens"] = {draw.choice(tokens): 360 + at for at in range(3)}
    return files


def llama_tokenizer() -> Tokenizer:
    """As tokenizer.json of Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "i", "Hi", "▁Hi", "é"]
    merges = [("H", "i"), ("▁", "Hi")]
    ids = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize("declared", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma"])
def test_text_after_special_tokens_has_the_ids_of_transformers(
    tmp_path: Path, family: str, declared: str, config: dict[str, Any]
) -> None:
    fields = config | {"tokenizer_class": declared, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "tokenizer.json").write_text(llama_tokenizer().to_str())
    expected, vocabulary = (
        AutoTokenizer.from_pretrained(tmp_path),
        Vocabulary.from_files(tokenizer_files.read(tmp_path)),
    )
    for text in ("Hi", " Hi", "</s>Hi", "</s> Hi</s>  é 👋👋", "Hi  Hi\n<s>"):
        ids, detokenizer = expected.encode(text), vocabulary.detokenizer()
        assert vocabulary.encode(text) == ids
        assert vocabulary.encode_rendered(text) == expected.encode(text, add_special_tokens=False)
        shown = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        assert shown == expected.decode(ids, skip_special_tokens=True)
    turns = [Turn("user", "Hi")]
    assert vocabulary.template is not None
    rendered = expected.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], tokenize=False
    )
    assert vocabulary.template.render(turns) == rendered


def test_hash_counts_tokens_of_every_file(tmp_path: Path) -> None:
    folders = {name: folder_of(tmp_path / str(at), files) for at, (name, files) in enumerate(CASES.items())}
    hashes = {name: tokenizer_files.tokenizer_hash(folder) for name, folder in folders.items()}
    ids = {name: AutoTokenizer.from_pretrained(folder).get_vocab() for name, folder in folders.items()}
    for name in CASES:
        assert (hashes[name] == hashes["none"]) == (ids[name] == ids["none"]), name
