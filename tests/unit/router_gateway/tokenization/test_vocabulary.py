"""Tests of the vocabulary from files: ids, template, end tokens, and invalid files."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from router_gateway.tokenization.chat_template import Turn
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.errors import Incompatible
from tests.support.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer, tokenizer_files, tokens


def vocabulary(**files: object) -> Vocabulary:
    """The small tokenizer's files with some replaced, by their names without the suffix; None leaves one out."""
    changed = {f"{name}.json": json.dumps(content).encode() for name, content in files.items() if content is not None}
    absent = {f"{name}.json" for name, content in files.items() if content is None}
    given = tokenizer_files() | changed
    return Vocabulary.from_files({name: content for name, content in given.items() if name not in absent})


def test_encode_adds_the_special_tokens_of_the_tokenizer() -> None:
    with_first = json.loads(byte_tokenizer().to_str())
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    with_first["post_processor"] = json.loads(template.__getstate__())
    read = vocabulary(tokenizer=with_first)
    assert read.encode("hello") == [1, *tokens("hello")]
    assert read.encode_rendered("<|im_start|>hello") == [1, *tokens("hello")]


def test_encode_does_not_truncate() -> None:
    short = json.loads(byte_tokenizer().to_str())
    short["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    short["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    assert vocabulary(tokenizer=short).encode("hello there, hello world") == tokens("hello there, hello world")
    assert vocabulary(tokenizer=short).encode("hello") == tokens("hello")


@pytest.mark.parametrize(
    ("files", "end_tokens"),
    [
        ({"generation_config": {"eos_token_id": [2, 0]}, "config": {"eos_token_id": 1}}, (2, 0)),
        ({"generation_config": {"eos_token_id": 0}}, (0, 2)),
        ({"generation_config": {}, "config": {"eos_token_id": 1}}, (1, 2)),
        ({"generation_config": None}, (2,)),
        ({"generation_config": None, "tokenizer_config": {"eos_token": {"content": "<|endoftext|>"}}}, (0,)),
        ({"generation_config": None, "tokenizer_config": {}}, ()),
    ],
)
def test_end_tokens_are_those_of_the_configuration_and_of_the_tokenizer(
    files: dict[str, object], end_tokens: tuple[int, ...]
) -> None:
    assert vocabulary(**files).end_tokens == end_tokens


@pytest.mark.parametrize(
    ("template", "end_tokens"),
    [
        (CHAT_TEMPLATE, (0, 2)),
        ("{% for m in messages %}{{ m.content }}\n<|im_start|>{% endfor %}", (0, 1)),
        ("{% for m in messages %}{{ m.content }} the{% endfor %}", (0,)),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", (0,)),
        ("{{ raise_exception('no') }}", (0,)),
    ],
)
def test_end_of_turn_of_the_template_is_an_end_token(template: str, end_tokens: tuple[int, ...]) -> None:
    config = {"eos_token": "<|endoftext|>", "chat_template": template}
    assert vocabulary(generation_config=None, tokenizer_config=config).end_tokens == end_tokens


def test_template_absence_names_the_templates_that_there_are() -> None:
    read = vocabulary(tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]})
    assert read.template is None
    assert read.template_absence == "none of its chat templates is named default: rag"


def test_template_comes_from_its_file_or_the_configuration() -> None:
    files = tokenizer_files() | {"chat_template.jinja": b"{{ bos_token }}own"}
    own = Vocabulary.from_files(files).template
    assert own is not None
    assert own.render([Turn("user", "x")]) == "<|im_start|>own"
    named = vocabulary(tokenizer_config={"chat_template": [{"name": "default", "template": "listed"}]}).template
    assert named is not None
    assert named.render([Turn("user", "x")]) == "listed"


def test_vocabulary_without_template() -> None:
    assert vocabulary(tokenizer_config={}).template is None


def test_max_token_bytes_bounds_every_token() -> None:
    longest = vocabulary().max_token_bytes
    decoded = (byte_tokenizer().decode([token_id]) for token_id in range(byte_tokenizer().get_vocab_size()))
    assert longest >= max(len(text.encode()) for text in decoded)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json"),
        (tokenizer_files() | {"tokenizer_config.json": b"{"}, "tokenizer_config.json"),
        (tokenizer_files() | {"generation_config.json": b"[]"}, "generation_config.json"),
        (tokenizer_files() | {"chat_template.jinja": b"{% for %}"}, "chat template"),
        (tokenizer_files() | {"chat_template.jinja": b"{{" + b"(" * 100_000}, "chat template"),
        (tokenizer_files() | {"chat_template.jinja": b"\xff"}, r"chat_template\.jinja"),
    ],
)
def test_invalid_file_is_named(files: dict[str, bytes], named: str) -> None:
    with pytest.raises(Incompatible, match=named):
        Vocabulary.from_files(files)
