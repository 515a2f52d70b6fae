"""Parses the bodies of requests: JSON in, a pydantic model out, without unknown fields and without other types.

Raises InvalidRequest with the path of the field, such as `messages[0].content`. What is counted before a model is built
keeps the number of errors, each of which is an object, in proportion to the request.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from router_gateway.http.errors import Refusal
from router_gateway.requests.limits import Amount
from router_gateway.rpc.messages import MAX_FIELDS, UNCOUNTED_BYTES
from stitch.errors import InvalidRequest

Item = TypeVar("Item")
# A list whose first invalid item ends it.
Items = Annotated[list[Item], Field(fail_fast=True)]


class Body(BaseModel):
    """An object of a request's JSON. A field that is null is not set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


_CONTENT: TypeAdapter[Any] = TypeAdapter(Any)
BodyType = TypeVar("BodyType", bound=Body)


def parse(kind: type[BodyType], data: bytes) -> BodyType:
    """The body in `data`. Raises InvalidRequest, or Refusal for a field that it doesn't have."""
    try:
        content = _CONTENT.validate_json(data)
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise InvalidRequest("body", Amount(f"{len(data):,} bytes"), f"it is no JSON: {reason}") from error
    if len(data) > UNCOUNTED_BYTES and _has_more_values(content, MAX_FIELDS):
        raise InvalidRequest("body", Amount(f"{len(data):,} bytes"), f"they have more than {MAX_FIELDS:,} values")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _invalid(error, content) from error


def _has_more_values(content: Any, limit: int) -> bool:
    """Whether objects and lists have more than `limit` values together; numbers in a list of numbers don't count."""
    count, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        inner: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        counted = [one for one in inner if type(one) is not int] if isinstance(value, list) else inner
        count += len(counted)
        if count > limit:
            return True
        waiting += [one for one in counted if isinstance(one, (dict, list))]
    return False


def _invalid(error: ValidationError, content: Any) -> InvalidRequest | Refusal:
    """The error for the innermost field of those that are invalid, which says most, or for the type that it isn't."""
    errors = error.errors(include_url=False, include_context=False)
    found = [(_path(one["loc"], content, one["type"] == "missing"), one) for one in errors]
    path, first = max(found, key=lambda pair: (len(pair[0]), pair[0][-1:] == ["type"]))
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".") or "body"
    if first["type"] == "extra_forbidden":
        return Refusal(400, "unsupported_parameter", f"{name[:80]} is not supported by this gateway", name[:80])
    if first["type"] == "missing":
        return InvalidRequest(name, Amount("not set"), "it is required")
    text = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(name, first["input"], text[:1].lower() + text[1:])


def _path(location: tuple[int | str, ...], content: Any, missing: bool) -> list[int | str]:
    """The steps of a location that are in the content, without the names of pydantic's alternatives.

    The last step of a `missing` field is kept.
    """
    path: list[int | str] = []
    for index, step in enumerate(location):
        inside = step in content if isinstance(content, dict) else isinstance(content, list) and isinstance(step, int)
        if inside:
            content = content[step]
        elif not missing or index < len(location) - 1:
            continue
        path.append(step)
    return path
