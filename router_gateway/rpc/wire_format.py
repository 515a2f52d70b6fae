"""Reads the fields of serialized messages without building them, so that messages are counted before they are parsed.

https://protobuf.dev/programming-guides/encoding describes the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}
_MAX_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field on the wire, with the range of its value."""

    number: int
    # Whether its length precedes it, as for strings and messages.
    delimited: bool
    start: int
    end: int


def fields(data: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in a range. Raises DecodeError."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            length, begin = _varint(data, at, end)
            at = begin + length
        elif kind == 0:
            begin = at
            _, at = _varint(data, at, end)
        elif kind in _FIXED_BYTES:
            begin = at
            at += _FIXED_BYTES[kind]
        else:
            raise DecodeError(f"wire type {kind}")
        if at > end:
            raise DecodeError("a field is longer than its message")
        yield Field(tag >> 3, kind == _LENGTH_DELIMITED, begin, at)


def has_more_fields(data: bytes, message: type[Message], limit: int) -> bool:
    """Whether a message and those inside it have more than `limit` fields before their end or their first error."""
    waiting: list[tuple[Any, int, int]] = [(message.DESCRIPTOR, 0, len(data))]
    count = 0
    while waiting:
        descriptor, start, end = waiting.pop()
        try:
            for field in fields(data, start, end):
                count += 1
                if count > limit:
                    return True
                known = descriptor.fields_by_number.get(field.number)
                if field.delimited and known is not None and known.message_type is not None:
                    waiting.append((known.message_type, field.start, field.end))
        except DecodeError:
            return False
    return False


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = shift = 0
    for index in range(at, min(end, at + _MAX_VARINT_BYTES)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise DecodeError("a number without an end")
