"""The base class of every configuration section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stitch.settings import Settings


class Section(Settings):
    port: int = 1


def test_settings_refuse_value_of_other_type() -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        Section.model_validate({"port": "1"})


def test_settings_refuse_unknown_field() -> None:
    with pytest.raises(ValidationError, match="not permitted"):
        Section.model_validate({"prot": 1})


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Section().port = 2  # type: ignore[misc]
