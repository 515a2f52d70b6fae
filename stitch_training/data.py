"""Documents out of training files: plain text, JSON Lines, chats. Knows no tokenizer.

A `.jsonl` file has one object a line, and the first of these that an object has makes the document:

    messages            a conversation, [{"role": ..., "content": ...}, ...]
    text                plain text
    question, answer    a conversation of two turns, or of one where there is no answer
    prompt              a conversation of one turn

Any other file is one document of plain text. Either may be compressed (`.gz`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from stitch.errors import InvalidRequest, shown

_FIELDS = "its line needs `messages`, `text`, `question` or `prompt`"


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation for the tokenizer's chat template."""

    text: str = ""
    turns: tuple[Turn, ...] = ()

    def content(self) -> str:
        """Everything in it as one string, whatever its form."""
        return self.text or "\n".join(f"{turn.role}: {turn.content}" for turn in self.turns)


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file, in its order, without holding the file in memory where it is JSON Lines.

    Raises InvalidRequest, which names the file and the line, where it can't be read as such.
    """
    try:
        with _opened(path) as lines:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _rows(path, lines)
            else:
                yield Document(text=lines.read())
    except (OSError, EOFError) as error:
        raise InvalidRequest("data", path.name, f"it can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("data", path.name, f"it is not UTF-8: {error}") from error


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _rows(path: Path, lines: TextIO) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield to_document(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InvalidRequest("data", f"{path.name}:{number}", str(error)) from error


def to_document(row: object) -> Document:
    """The document of one JSON object; ValueError where it holds none."""
    if not isinstance(row, dict):
        raise ValueError(f"its line must be an object, not {shown(row)}")
    if "messages" in row:
        return Document(turns=_turns(row["messages"]))
    if "text" in row:
        return Document(text=_string(row, "text"))
    for field in ("question", "prompt"):
        if field in row:
            asked = Turn("user", _string(row, field))
            return Document(turns=(asked, Turn("assistant", _string(row, "answer"))) if "answer" in row else (asked,))
    raise ValueError(f"{_FIELDS}, and has {', '.join(map(str, row)) or 'nothing'}")


def _string(row: dict[str, object], field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"`{field}` must be a string, not {shown(value)}")
    return value


def _turns(messages: object) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of messages, not {shown(messages)}")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"`messages` must hold objects, not {shown(message)}")
    for field in ("role", "content"):
        if any(field not in message for message in messages):
            raise ValueError(f"`messages` has one without `{field}`")
    return tuple(Turn(_string(message, "role"), _string(message, "content")) for message in messages)
