"""Writes three training files, code, prose and questions, from local folders.

    python benchmarks/quality/corpus.py --out DIR --code FOLDER --prose FOLDER... --questions FILE.jsonl.gz...

Code is every `.py` file (such as a Python standard library) and prose the text of every `.html` page (such as the Rust
books under `share/doc/rust/html`), split into documents of a few thousand characters. Questions are GSM8K-like rows,
half of them as conversations and half as plain text, or prompts as plain text. The order is drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path

DOCUMENT_CHARACTERS = 6000
# Tests, generated tables and bundled copies teach little about code.
SKIPPED = {"test", "tests", "site-packages", "encodings", "pydoc_data", "lib2to3", "idlelib", "__pycache__"}
# Translations and superseded editions, whose pages repeat each other.
SKIPPED_PROSE = {"es", "ja", "ko", "zh", "first-edition", "second-edition", "2018-edition"}
_BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "pre", "div", "tr", "br", "blockquote"}
_SILENT = {"script", "style", "nav", "head", "button", "svg", "noscript"}


class Page(HTMLParser):
    """Collects the readable text of one kind of element of a page."""

    def __init__(self, within: str) -> None:
        super().__init__()
        self._within, self._inside, self._silent = within, 0, 0
        self._parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside += tag == self._within
        self._silent += tag in _SILENT
        if tag in _BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag == self._within
        self._silent -= tag in _SILENT
        if tag in _BLOCKS:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._inside and not self._silent:
            self._parts.append(data)

    def text(self) -> str:
        """Returns the readable text, without runs of empty lines."""
        lines = [line.rstrip() for line in "".join(self._parts).splitlines()]
        return "\n".join(line for line, previous in zip(lines, ["", *lines], strict=False) if line or previous).strip()


def page_text(html: str, within: str = "main") -> str:
    """Returns the readable text of one page."""
    page = Page(within)
    page.feed(html)
    return page.text()


def pieces(text: str) -> Iterator[str]:
    """Splits `text` at line ends into documents of about DOCUMENT_CHARACTERS."""
    piece: list[str] = []
    for line in text.splitlines(keepends=True):
        piece.append(line)
        if sum(map(len, piece)) >= DOCUMENT_CHARACTERS:
            yield "".join(piece)
            piece = []
    if piece:
        yield "".join(piece)


def code_documents(folders: Iterable[Path]) -> Iterator[str]:
    """Yields pieces of the Python source under `folders`."""
    for path in sorted(chain.from_iterable(folder.rglob("*.py") for folder in folders)):
        if not SKIPPED & set(path.parts):
            yield from pieces(path.read_text(errors="ignore"))


def prose_documents(folders: Iterable[Path]) -> Iterator[str]:
    """Yields pieces of the text of the HTML pages under `folders`."""
    for path in sorted(chain.from_iterable(folder.rglob("*.html") for folder in folders)):
        if path.name not in ("print.html", "CHANGELOG.html") and not SKIPPED_PROSE & set(path.parts):
            yield from (piece for piece in pieces(page_text(path.read_text(errors="ignore"))) if len(piece) > 500)


def question_rows(files: Iterable[Path]) -> Iterator[dict[str, object]]:
    """Yields rows with an answer alternately as text and as conversations, and prompts as text."""
    for path in files:
        with gzip.open(path, "rt") as lines:
            for number, row in enumerate(map(json.loads, lines)):
                if "answer" in row and number % 2:
                    yield {"messages": [_turn("user", row["question"]), _turn("assistant", row["answer"])]}
                else:
                    yield {"text": "\n".join(row[field] for field in ("question", "answer", "prompt") if field in row)}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Writes one row per line, in a fixed random order."""
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in shuffled)
    print(f"{path}: {len(shuffled)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for kind in ("code", "prose", "questions"):
        parser.add_argument(f"--{kind}", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "code.jsonl.gz", ({"text": text} for text in code_documents(args.code)))
    write(args.out / "prose.jsonl.gz", ({"text": text} for text in prose_documents(args.prose)))
    write(args.out / "questions.jsonl.gz", question_rows(args.questions))


if __name__ == "__main__":
    main()
