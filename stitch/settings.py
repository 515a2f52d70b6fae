"""The base class of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """An immutable, strictly typed section that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
