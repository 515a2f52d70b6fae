"""Reads replies of the HTTP port as OpenAI's own types, which take any field, and finds those that they don't know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel

Reply = TypeVar("Reply", bound=BaseModel)
# The one field beyond OpenAI's, of a reply or of the response in an event.
OWN = ("stitch", "response.stitch")
_UNION, *_ = get_args(ResponseStreamEvent)
EVENTS: Mapping[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(_UNION)
}


def checked(kind: type[Reply], content: Mapping[str, Any]) -> Reply:
    """The reply as that type. Raises where it doesn't validate, or has a field beyond it."""
    reply = kind.model_validate(content)
    unknown = [name for name in _unknown(reply, "") if name not in OWN]
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    return reply


def events(text: str) -> list[str]:
    """The data of all events of a stream; comments are left out."""
    blocks = text.split("\n\n")
    if blocks.pop():
        raise ValueError("the stream ends within an event")
    lines = [line for block in blocks for line in block.split("\n") if not line.startswith(":")]
    if not all(line.startswith("data: ") for line in lines):
        raise ValueError(f"no events: {lines}")
    return [line.removeprefix("data: ") for line in lines]


def chunks(text: str) -> list[dict[str, Any]]:
    """The JSON of all events of a complete stream."""
    *data, last = events(text)
    if last != "[DONE]":
        raise ValueError(f"the stream ends with {last}")
    return [json.loads(one) for one in data]


def response_events(text: str) -> list[Any]:
    """The events of a response, numbered from 0, each of its own type."""
    found: list[Any] = []
    *blocks, rest = text.split("\n\n")
    for block in blocks:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        if name != f"event: {content['type']}" or content["sequence_number"] != len(found):
            raise ValueError(f"event {len(found)} is {block}")
        found.append(checked(EVENTS[content["type"]], content))
    if rest:
        raise ValueError("the stream ends within an event")
    return found


def _unknown(value: object, path: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name in value.model_extra or ():
            yield f"{path}{name}"
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for one in value:
            yield from _unknown(one, path)
