"""Twenty JSON schemas of small values, for answers of models that say anything."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": -9, "maximum": 99}


def record(**properties: object) -> dict[str, object]:
    """The schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: tuple[dict[str, Any], ...] = (
    record(a=DIGIT),
    record(name=WORD, age=DIGIT),
    record(tags={"type": "array", "items": WORD, "maxItems": 3}),
    record(on={"type": "boolean"}, off={"type": "null"}),
    record(color={"enum": ["red", "green", "blue é"]}),
    record(kind={"const": "<|im_end|>"}),
    record(inner=record(x=DIGIT, y=DIGIT)),
    record(list={"type": "array", "items": record(x=DIGIT), "minItems": 1, "maxItems": 2}),
    record(either={"anyOf": [DIGIT, WORD]}),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    record(day={"type": "string", "format": "date"}),
    record(at={"type": "string", "format": "time"}),
    record(even={"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 50}),
    record(part={"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}),
    {"type": "array", "items": DIGIT, "maxItems": 4},
    {"type": "array", "prefixItems": [DIGIT, WORD], "minItems": 2, "items": False},
    {"$ref": "#/$defs/leaf", "$defs": {"leaf": record(v=DIGIT)}},
    {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    {"allOf": [record(a=DIGIT), {"properties": {"a": {"minimum": 5}}}]},
    {"enum": [{"a": [1, 2]}, "text", None, 3.5]},
)
