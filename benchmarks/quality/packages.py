"""Writes two training files, packages and manuals, from many packages' source archives.

    python benchmarks/quality/packages.py --out DIR --archives FOLDER [--pages FOLDER...] [--without django ...]

Packages is Python source, manuals the documentation in reStructuredText, Markdown and text; a few short pieces of each,
so that no package dominates. `--pages` adds pieces of HTML pages to the manuals, a quarter of their number. Archives
named by `--without` are left out, and may serve as text of other origin. The order is drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import random
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from benchmarks.quality.corpus import page_text, write

PIECE_CHARACTERS = 2400
# Shorter files have little text; larger ones are data.
LEAST_CHARACTERS, MOST_BYTES = 600, 400_000
# Pieces of one package for each of the two files; characters per piece, and pieces, of one page.
MOST_PIECES, PAGE_CHARACTERS, MOST_PAGE_PIECES = 24, 4000, 8
# Pieces of manuals per piece of a page.
PAGES_DIVISOR = 4
_SKIPPED = re.compile("/test|vendor")
_NO_MANUAL = re.compile("licen|author|contribut|change|history|news|require")


def files_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the files in a `.tar.gz` or `.zip`."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if entry.file_size < MOST_BYTES:
                    yield entry.filename, zipped.read(entry)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isfile() and member.size < MOST_BYTES and (content := tarred.extractfile(member)) is not None:
                yield member.name, content.read()


def is_code(name: str) -> bool:
    """Whether a file is a package's source, not a test or a copy of another package."""
    return name.endswith(".py") and not _SKIPPED.search(name.lower())


def is_manual(name: str) -> bool:
    """Whether a file is documentation of a package."""
    lower = name.lower()
    kind = lower.endswith((".rst", ".md")) or (lower.endswith(".txt") and "/doc" in lower)
    return kind and not _SKIPPED.search(lower) and not _NO_MANUAL.search(Path(lower).name)


def piece(text: str, draw: random.Random) -> str:
    """Returns PIECE_CHARACTERS from the start of a random line of `text`, or a shorter text as a whole."""
    start = text.rfind("\n", 0, draw.randrange(max(1, len(text) - PIECE_CHARACTERS))) + 1
    return text[start : start + PIECE_CHARACTERS]


def pieces_of(texts: list[str], draw: random.Random) -> Iterator[str]:
    """Yields a piece of each of at most MOST_PIECES texts."""
    draw.shuffle(texts)
    yield from (piece(text, draw) for text in islice((t for t in texts if len(t) >= LEAST_CHARACTERS), MOST_PIECES))


def package_pieces(archives: Iterable[Path], draw: random.Random) -> tuple[list[str], list[str]]:
    """Returns pieces of code and of manuals."""
    code: list[str] = []
    manuals: list[str] = []
    for archive in archives:
        sources: list[str] = []
        texts: list[str] = []
        for name, content in files_of(archive):
            found = sources if is_code(name) else texts if is_manual(name) else None
            if found is not None:
                found.append(content.decode(errors="ignore"))
        code += pieces_of(sources, draw)
        manuals += pieces_of(texts, draw)
    return code, manuals


def page_pieces(folders: Iterable[Path], draw: random.Random) -> list[str]:
    """Returns pieces of the HTML pages under `folders`, in random order."""
    found = []
    for path in sorted(chain.from_iterable(folder.rglob("*.html") for folder in folders)):
        text = page_text(path.read_text(errors="ignore"), within="body")
        found += [piece(text, draw) for _ in range(min(MOST_PAGE_PIECES, len(text) // PAGE_CHARACTERS))]
    draw.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archives", type=Path, required=True)
    parser.add_argument("--pages", type=Path, nargs="+", default=[])
    parser.add_argument("--without", nargs="+", default=[], help="leave out archives with these words in their names")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    kept = [path for path in sorted(args.archives.iterdir()) if not any(word in path.name for word in args.without)]
    code, manuals = package_pieces(kept, draw)
    manuals += page_pieces(args.pages, draw)[: len(manuals) // PAGES_DIVISOR]
    write(args.out / "packages.jsonl.gz", ({"text": text} for text in code))
    write(args.out / "manuals.jsonl.gz", ({"text": text} for text in manuals))


if __name__ == "__main__":
    main()
