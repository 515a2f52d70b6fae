"""The base of every configuration section. Knows no section of its own."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable, strictly typed, and with no field that nobody reads."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
