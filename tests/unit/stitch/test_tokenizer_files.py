"""Tests of a model's tokenizer files: one hash for one tokenizer, end tokens, the chat template, invalid fields."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import Incompatible
from stitch.tokenizer_files import chat_template, check, end_tokens, token_count, tokenizer_hash
from tests.support.byte_tokenizer import byte_tokenizer

Fields = dict[str, Any]


def write(folder: Path, fields: Fields) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def fields() -> Fields:
    read: Fields = json.loads(byte_tokenizer().to_str())
    return read


def merges_as_strings(given: Fields) -> None:
    given["model"]["merges"] = [" ".join(pair) for pair in given["model"]["merges"]]


def special_tokens_outside_the_vocabulary(given: Fields) -> None:
    for added in given["added_tokens"]:
        del given["model"]["vocab"][added["content"]]


def vocabulary_in_another_order(given: Fields) -> None:
    given["model"]["vocab"] = dict(reversed(given["model"]["vocab"].items()))


def two_tokens_exchanged(given: Fields) -> None:
    vocabulary = given["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def two_merges_exchanged(given: Fields) -> None:
    merges = given["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def one_special_token_more(given: Fields) -> None:
    given["added_tokens"].append({"content": "<tool>", "id": 999})


@pytest.mark.parametrize(
    "change", [merges_as_strings, special_tokens_outside_the_vocabulary, vocabulary_in_another_order]
)
def test_hash_does_not_depend_on_the_format(tmp_path: Path, change: Callable[[Fields], None]) -> None:
    changed = fields()
    change(changed)
    assert tokenizer_hash(write(tmp_path / "a", changed)) == tokenizer_hash(write(tmp_path / "b", fields()))


@pytest.mark.parametrize("change", [two_tokens_exchanged, two_merges_exchanged, one_special_token_more])
def test_hash_changes_with_the_tokenizer(tmp_path: Path, change: Callable[[Fields], None]) -> None:
    changed = fields()
    change(changed)
    assert tokenizer_hash(write(tmp_path / "a", changed)) != tokenizer_hash(write(tmp_path / "b", fields()))


def test_token_count_leaves_out_padding(tmp_path: Path) -> None:
    more = fields()
    one_special_token_more(more)
    assert token_count(write(tmp_path / "a", fields())) == byte_tokenizer().get_vocab_size()
    assert token_count(write(tmp_path / "b", more)) == 1000


def test_vocabulary_may_be_a_list_with_scores(tmp_path: Path) -> None:
    unigram: Fields = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}, "added_tokens": []}
    assert token_count(write(tmp_path / "a", unigram)) == 2


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"has no tokenizer\.json"):
        tokenizer_hash(tmp_path)


def test_import_does_not_load_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", fields())
    program = (
        "import sys; from pathlib import Path; from stitch.tokenizer_files import tokenizer_hash;"
        "print(tokenizer_hash(Path(sys.argv[1]))); sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(folder)


def files_of(**files: object) -> dict[str, bytes]:
    return {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [2, 0]}, "config": {"eos_token_id": 1}}, [2, 0]),
        ({"generation_config": {"eos_token_id": 5}, "config": {"eos_token_id": 1}}, [5]),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 1}}, [1]),
        ({"generation_config": {"eos_token_id": []}, "config": {"eos_token_id": 1}}, []),
        # The model is padded beyond its tokenizer.
        ({"config": {"eos_token_id": 11, "vocab_size": 12}}, [11]),
        ({}, []),
    ],
)
def test_end_tokens_come_from_the_first_file_that_states_any(files: Fields, expected: list[int]) -> None:
    assert end_tokens(files_of(**files), tokens=10) == expected


@pytest.mark.parametrize("given", [-1, "2", 10, 2.0, True, {"id": 2}, [2, -1], [2, None], ["</s>"], [[2]]])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_end_token_that_is_no_id_is_refused(name: str, given: object) -> None:
    wrong = given[-1] if isinstance(given, list) and len(given) > 1 else given
    wrong = given[0] if isinstance(given, list) and len(given) == 1 else wrong
    with pytest.raises(Incompatible) as refused:
        end_tokens(files_of(**{name: {"eos_token_id": given}}), tokens=10)
    assert str(refused.value) == f"{name}.json: eos_token_id is {wrong!r}, but it must be a token's id, 0 to 9"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, "the model has no chat template")),
        ({"tokenizer_config": {"chat_template": None}}, (None, "the model has no chat template")),
        ({"tokenizer_config": {"chat_template": "one"}}, ("one", "")),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": "listed"}]}}, ("listed", "")),
        ({"tokenizer_config": {"chat_template": {"tool_use": "b", "default": "named"}}}, ("named", "")),
        ({"chat_template": {"chat_template": "processor"}}, ("processor", "")),
        ({"chat_template": {"chat_template": "processor"}, "tokenizer_config": {"chat_template": "own"}}, ("own", "")),
        (
            {
                "tokenizer_config": {
                    "chat_template": [{"name": "tool_use", "template": "b"}, {"name": "rag", "template": "c"}]
                }
            },
            (None, "none of its chat templates is named default: rag, tool_use"),
        ),
        (
            {"tokenizer_config": {"chat_template": []}},
            (None, "none of its chat templates is named default: it has none"),
        ),
    ],
)
def test_chat_template_is_the_default_one_or_has_a_reason(files: Fields, expected: tuple[str | None, str]) -> None:
    assert chat_template(files_of(**files)) == expected


def test_chat_template_of_its_own_file_takes_precedence() -> None:
    files = files_of(tokenizer_config={"chat_template": "configured"}) | {"chat_template.jinja": b"own"}
    assert chat_template(files) == ("own", "")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer_config": {"chat_template": 42}}, "tokenizer_config.json: chat_template is 42, but"),
        ({"tokenizer_config": {"chat_template": ["x"]}}, "tokenizer_config.json: chat_template is 'x', but"),
        ({"tokenizer_config": {"chat_template": [{"name": "default"}]}}, "needs a name and a template"),
        ({"tokenizer_config": {"chat_template": {"default": 1}}}, "chat_template is 1, but"),
        ({"chat_template": {"chat_template": 1.5}}, "chat_template.json: chat_template is 1.5, but"),
        ({"chat_template": "x"}, "chat_template.json holds no object, but str"),
        ({"tokenizer_config": {"eos_token": ["</s>"]}}, "eos_token is ['</s>'], but it must be a string"),
        ({"tokenizer_config": {"bos_token": 1}}, "bos_token is 1, but"),
        ({"tokenizer_config": {"bos_token": "\ud83d"}}, r"bos_token is '\ud83d', but"),
        ({"tokenizer_config": {"eos_token": {"content": None}}}, "eos_token is {'content': None}, but"),
        ({"tokenizer_config": {"additional_special_tokens": "<x>"}}, "additional_special_tokens is '<x>', but"),
        ({"tokenizer_config": {"extra_special_tokens": [1]}}, "additional_special_tokens is 1, but"),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": 3}}}, "image_token is 3, but"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "added_tokens_decoder is 'x', but"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<x>"]}}, "added_tokens_decoder is ['<x>'], but"),
        ({"special_tokens_map": {"pad_token": 3}}, "special_tokens_map.json or tokenizer_config.json: pad_token is 3"),
        ({"added_tokens": {"<x>": "360"}}, "added_tokens.json: <x> is '360', but"),
        ({"generation_config": {"eos_token_id": -1}}, "generation_config.json: eos_token_id is -1, but"),
        ({"config": {"eos_token_id": 9_999, "vocab_size": 400}}, "config.json: eos_token_id is 9999, but"),
    ],
)
def test_check_names_the_field_that_is_invalid(tmp_path: Path, files: Fields, named: str) -> None:
    folder = write(tmp_path / "a", fields())
    for name, content in files_of(**files).items():
        (folder / name).write_bytes(content)
    with pytest.raises(Incompatible) as refused:
        check(folder)
    assert named in str(refused.value)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[" * 100_000, b"null"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_check_names_the_file_that_is_no_json_object(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write(tmp_path / "a", fields())
    (folder / name).write_bytes(content)
    with pytest.raises(Incompatible, match=name):
        check(folder)


@pytest.mark.parametrize("model", [None, {}, {"vocab": {}}, {"vocab": {"a": "b"}}, {"vocab": [1]}])
def test_tokenizer_without_tokens_is_refused(tmp_path: Path, model: object) -> None:
    with pytest.raises(Incompatible, match=r"tokenizer\.json is no tokenizer"):
        check(write(tmp_path / "a", {"model": model}))


def test_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", fields())
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(Incompatible, match=r"tokenizer\.json can't be read: it is a Git LFS pointer"):
        check(folder)


def test_check_names_a_template_that_is_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", fields())
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(Incompatible, match=r"chat_template\.jinja"):
        check(folder)
