"""The pieces that the packages script takes from source archives and pages."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.quality import packages
from stitch_training.data import read_documents

LONG = "A line that says something.\n" * 40
FILES = {
    "pack-1.0/pack/core.py": f"{LONG}code",
    "pack-1.0/tests/test_core.py": f"{LONG}test",
    "pack-1.0/pack/_vendor/six.py": f"{LONG}copy",
    "pack-1.0/docs/guide.rst": f"{LONG}guide",
    "pack-1.0/docs/intro.txt": f"{LONG}intro",
    "pack-1.0/CHANGES.md": f"{LONG}changes",
    "pack-1.0/data.txt": f"{LONG}data",
    "pack-1.0/README.md": "short",
}


def write_archives(folder: Path) -> None:
    with (
        tarfile.open(folder / "pack-1.0.tar.gz", "w:gz") as tarred,
        zipfile.ZipFile(folder / "held-2.zip", "w") as zipped,
    ):
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tarred.addfile(member, io.BytesIO(text.encode()))
            zipped.writestr(name.replace("pack", "held"), text.replace("line", "sentence"))


def made(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[set[str]]:
    given = ["--out", str(folder / out), "--archives", str(folder / "archives"), *more]
    monkeypatch.setattr("sys.argv", ["packages", *given])
    packages.main()
    files = (folder / out / f"{kind}.jsonl.gz" for kind in ("packages", "manuals"))
    return [{document.text for document in read_documents(file)} for file in files]


def test_packages_and_manuals_are_read_from_tar_and_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "archives").mkdir()
    write_archives(tmp_path / "archives")
    code, manuals = made(tmp_path, "all", monkeypatch)
    assert {text.split()[-1] for text in code} == {"code"}
    assert {text.split()[-1] for text in manuals} == {"guide", "intro"}
    assert (len(code), len(manuals)) == (2, 4)
    code, manuals = made(tmp_path, "some", monkeypatch, "--without", "held", "other")
    assert code == {FILES["pack-1.0/pack/core.py"]}
    assert manuals == {FILES["pack-1.0/docs/guide.rst"], FILES["pack-1.0/docs/intro.txt"]}


def test_pages_are_added_to_the_manuals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "archives").mkdir()
    write_archives(tmp_path / "archives")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.html").write_text(f"<head>no</head><body><p>{LONG * 5}</p></body>")
    _, manuals = made(tmp_path, "out", monkeypatch, "--pages", str(tmp_path / "pages"))
    assert len(manuals) == 5
    assert sum("no" in text.split() for text in manuals) == 0


@pytest.mark.parametrize("text", ["".join(f"line {n} of many\n" for n in range(1000)), "a\n" * 9 + "one word " * 900])
def test_piece_starts_at_a_line(text: str) -> None:
    found = {packages.piece(text, random.Random(seed)) for seed in range(9)}
    assert len(found) > 1 or text.count("\n") < 10
    for one in found:
        assert f"\n{text}".find(f"\n{one}") >= 0
        assert len(one) == packages.PIECE_CHARACTERS


def test_short_text_is_one_piece() -> None:
    assert packages.piece("two\nlines\n", random.Random(0)) == "two\nlines\n"
