"""What counts as a document, and what a file that holds none is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch_training.data import Document, Turn, read_documents, to_document


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "plain"}, Document(text="plain")),
        ({"prompt": "Why?"}, Document(turns=(Turn("user", "Why?"),))),
        ({"question": "1 + 1", "answer": "2"}, Document(turns=(Turn("user", "1 + 1"), Turn("assistant", "2")))),
        ({"question": "1 + 1", "task": "sums"}, Document(turns=(Turn("user", "1 + 1"),))),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            Document(turns=(Turn("user", "a"), Turn("assistant", "b"))),
        ),
        ({"messages": [{"role": "user", "content": "a"}], "text": "unread"}, Document(turns=(Turn("user", "a"),))),
    ],
)
def test_fields_make_a_document(row: dict[str, object], document: Document) -> None:
    assert to_document(row) == document


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "must be an object"),
        ({"task": "sums"}, "and has task"),
        ({}, "and has nothing"),
        ({"text": 3}, "`text` must be a string, not 3"),
        ({"question": "a", "answer": None}, "`answer` must be a string, not None"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": ["hi"]}, "must hold objects, not 'hi'"),
        ({"messages": [{"role": "user"}]}, "without `content`"),
    ],
)
def test_a_row_that_is_no_document_says_why(row: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        to_document(row)


def test_json_lines_come_one_by_one(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"text": "a"}, {"prompt": "b"})
    path.write_text(path.read_text() + "\n")
    assert [document.content() for document in read_documents(path)] == ["a", "user: b"]


def test_gzip_is_read_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    assert list(read_documents(path)) == [Document(text="packed")]


def test_any_other_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("a = 1\nb = 2\n")
    assert list(read_documents(path)) == [Document(text="a = 1\nb = 2\n")]


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl:2"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "can't be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20], "can't be read"),
        ("none.jsonl.gz", b"no gzip at all", "can't be read"),
        ("latin.txt", "größer".encode("latin-1"), "not UTF-8"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says) as caught:
        list(read_documents(path))
    assert name in str(caught.value)
    assert caught.value.field == "data"
