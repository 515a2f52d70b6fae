"""The base of every configuration section. Knows no section of the product."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stitch.settings import Settings


class Section(Settings):
    port: int = 1


def test_values_are_typed_strictly() -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        Section.model_validate({"port": "1"})


def test_a_field_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="not permitted"):
        Section.model_validate({"prot": 1})


def test_a_section_never_changes() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Section().port = 2  # type: ignore[misc]
