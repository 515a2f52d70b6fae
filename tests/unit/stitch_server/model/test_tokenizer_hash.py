"""A tokenizer has one hash, independent of the format of its file; other tokenizers have other hashes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stitch.errors import Incompatible
from stitch_server.model.tokenizer_hash import token_count, tokenizer_hash
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
        "import sys; from pathlib import Path; from stitch_server.model.tokenizer_hash import tokenizer_hash;"
        "print(tokenizer_hash(Path(sys.argv[1]))); sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == tokenizer_hash(folder)
