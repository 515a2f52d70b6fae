"""Every class of errors has a status and a body over HTTP, and the documentation shows it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from router_gateway.http.errors import TABLE, body_of, headers_of, row_of
from stitch import errors
from stitch.errors import InvalidRequest, StitchError

ROOT = Path(__file__).parents[2]
CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, StitchError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_a_row(kind: type[StitchError]) -> None:
    assert kind in TABLE


def test_documentation_has_the_table() -> None:
    page = (ROOT / "docs/http.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    assert sorted(rows) == sorted((kind.__name__, str(row.status), row.kind, row.code) for kind, row in TABLE.items())


def test_class_without_a_row_has_its_parents() -> None:
    class Special(errors.Exhausted):
        """A class of no table."""

    assert row_of(Special("full")) == TABLE[errors.Exhausted]


def test_invalid_field_has_its_name_in_openais_api() -> None:
    error = json.loads(body_of(InvalidRequest("sampling.top_p", 2.0, "it must be at most 1")))["error"]
    assert error["param"] == "top_p"
    assert error["message"] == "top_p is 2.0, but it must be at most 1"


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.Exhausted("full", 0.2), "1"),
        (errors.Exhausted("full", 7.1), "8"),
        (errors.Unavailable("gone"), "1"),
        (errors.Draining("ending"), "1"),
        (errors.Expired("late"), None),
    ],
)
def test_errors_that_pass_say_when_to_come_back(error: StitchError, seconds: str | None) -> None:
    assert headers_of(error).get("retry-after") == seconds
