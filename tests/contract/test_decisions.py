"""Decision records have one form: a title, a status, context, decision and consequences, on one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
MAX_WORDS = 360
MAX_COLUMNS = 120
FORM = re.compile(
    r"# .+\n\nStatus: (accepted|superseded by (?P<by>\d{4}))\n\n## Context\n.+\n## Decision\n.+\n## Consequences\n.+",
    re.DOTALL,
)


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem)
def record(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_record_has_title_status_and_three_sections(record: Path) -> None:
    text = record.read_text()
    form = FORM.fullmatch(text)
    assert form is not None
    assert text.count("\n## ") == 3
    assert form["by"] is None or [one for one in RECORDS if one.name.startswith(form["by"])]


def test_record_fits_on_one_page(record: Path) -> None:
    text = record.read_text()
    assert len(text.split()) <= MAX_WORDS
    assert max(map(len, text.splitlines())) <= MAX_COLUMNS


def test_record_in_force_is_in_the_index(record: Path) -> None:
    if "\nStatus: accepted\n" in record.read_text():
        assert f"({record.name})" in (DOCS / "decisions/README.md").read_text()


def test_record_numbers_are_unique() -> None:
    numbers = [record.name[:4] for record in RECORDS]
    assert len(set(numbers)) == len(numbers) > 0
