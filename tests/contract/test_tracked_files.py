"""No tracked file names a folder of one machine or a package index."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Spelled so that this file does not find itself.
FORBIDDEN = {
    "a home folder": re.compile(r"/(root|home|Users)/[a-z]"),
    "a build machine's folder": re.compile(r"(?<![\w.])/(work|opt/pypi|opt/wheels)\b"),
    "a package index": re.compile(r"(files\.pythonhosted|pypi\.org/simple|download\.pytorch|index-url\s*[= ]\s*http)"),
    "a temporary folder": re.compile(r"[\"' ]/tmp/"),
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every tracked text file by its name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    if not names:
        pytest.skip("this is no git checkout")
    return {name: text for name in names if (text := _text(ROOT / name)) is not None}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_tracked_files_contain_no_forbidden_name(what: str, texts: dict[str, str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []


def test_forbidden_patterns_match_their_samples() -> None:
    samples = ("cd /home/" + "ada/src", "from /" + "work/main", "--index-" + "url https://example", "'/tmp" + "/model'")
    for sample in samples:
        assert any(pattern.search(sample) for pattern in FORBIDDEN.values()), sample


def _text(path: Path) -> str | None:
    """The file's text; None for a link, a folder, or bytes that are no text."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    return None if b"\0" in content[:8192] else content.decode(errors="replace")
