"""The documents that the corpus script makes from pages, source files and questions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.quality import corpus
from stitch_training.data import Turn, read_documents


def test_page_text_is_what_a_reader_sees() -> None:
    html = (
        "<html><head><title>no</title></head><nav>no</nav><main><h1>Cells</h1><script>no()</script>"
        "<p>Inner <b>mutability</b>.</p><ul><li>one</li><li>two</li></ul></main><footer>no</footer></html>"
    )
    assert [line for line in corpus.page_text(html).splitlines() if line] == [
        "Cells",
        "Inner mutability.",
        "one",
        "two",
    ]


def test_pieces_end_at_line_ends_and_keep_all_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "DOCUMENT_CHARACTERS", 10)
    text = "alpha\nbeta\ngamma\ndelta\n"
    assert list(corpus.pieces(text)) == ["alpha\nbeta\n", "gamma\ndelta\n"]


def test_corpus_writes_the_same_three_files_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "tests").mkdir(parents=True)
    (tmp_path / "lib" / "a.py").write_text("a = 1\n")
    (tmp_path / "lib" / "tests" / "test_a.py").write_text("skipped = 1\n")
    (tmp_path / "book" / "ja").mkdir(parents=True)
    page = f"<main><p>{'A long enough page. ' * 40}</p></main>"
    for name in ("a.html", "print.html", "ja/a.html"):
        (tmp_path / "book" / name).write_text(page)
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(4)] + [{"prompt": "Why?"}]
    (tmp_path / "asked.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    given = ["--code", tmp_path / "lib", "--prose", tmp_path / "book", "--questions", tmp_path / "asked.jsonl.gz"]
    found = []
    for out in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["corpus", "--out", str(tmp_path / out), *map(str, given)])
        corpus.main()
        kinds = ("code", "prose", "questions")
        found.append([list(read_documents(tmp_path / out / f"{kind}.jsonl.gz")) for kind in kinds])
    assert found[0] == found[1]
    code, prose, questions = found[0]
    assert [document.text for document in code] == ["a = 1\n"]
    assert len(prose) == 1
    assert sorted(document.text for document in questions if document.text) == ["0?\n0", "2?\n2", "Why?"]
    assert {document.turns for document in questions if document.turns} == {
        (Turn("user", f"{n}?"), Turn("assistant", str(n))) for n in (1, 3)
    }
