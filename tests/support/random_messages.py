"""Random changes to messages: any field of any depth, with valid values and invalid ones, and random bytes."""

from __future__ import annotations

import math
import sys
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stitch.v1 import inference_pb2

DENORMAL = 5e-324
FLOATS = (0.0, -0.0, 1.0, 0.5, DENORMAL, 1e-300, 1e-45, 1e-39, 1e-5, 100.0, 10.0, -2.0, sys.float_info.max, -1.0)
NOT_FINITE = (math.nan, math.inf, -math.inf)
INTEGERS = (0, 1, 2, 3, 20, 21, 255, 400, 2**31 - 1)
STRINGS = ("", "weak", "strong", "auto", "x", "\0", "é" * 9, "127.0.0.1:1", "no such place", "y" * 2_000)
SAMPLING: dict[str, tuple[float, ...]] = {
    "temperature": (0.0, DENORMAL, 1e-300, 1e-45, 1e-7, 1e-5, 0.7, 1.0, 100.0),
    "top_k": (0, 1, 2, 50, 2**32 - 1),
    "top_p": (DENORMAL, 1e-300, 1e-9, 0.5, 1.0),
    "min_p": (0.0, DENORMAL, 1e-9, 0.1, 1.0),
    "repetition_penalty": (DENORMAL, 1e-300, 1e-39, 0.5, 1.0, 1.3, 10.0),
    "presence_penalty": (-2.0, DENORMAL, 0.0, 2.0),
    "frequency_penalty": (-2.0, -DENORMAL, 0.0, 2.0),
    "seed": (0, 7, 2**64 - 1),
    "logprobs": (0, 1, 20),
}
BIASES = (-100.0, -DENORMAL, 0.0, 100.0)


def sampling(draw: Random, max_id: int) -> inference_pb2.Sampling:
    """Sampling within its limits, often at them; ids are at most a little above `max_id`."""
    fields: dict[str, Any] = {name: draw.choice(values) for name, values in SAMPLING.items() if draw.random() < 0.4}
    for name in ("stop_token_ids", "forced_token_ids"):
        if draw.random() < 0.2:
            fields[name] = [draw.randint(0, max_id + 12) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.2:
        fields["logit_bias"] = {draw.randint(0, max_id + 12): draw.choice(BIASES) for _ in range(draw.randint(1, 3))}
    if draw.random() < 0.2:
        fields["min_tokens"] = draw.randint(0, 4)
    return inference_pb2.Sampling(max_tokens=draw.randint(1, 3), ignore_eos=draw.random() < 0.5, **fields)


def changed(message: Message, draw: Random) -> None:
    """Sets, repeats or clears one random field of the message, or of one inside of it."""
    if not message.DESCRIPTOR.fields:
        return
    field: Any = draw.choice(message.DESCRIPTOR.fields)
    if draw.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(getattr(message, field.name), field, draw)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        changed(inner, draw)
    else:
        setattr(message, field.name, _value(field, draw))


def _change_repeated(items: Any, field: FieldDescriptor, draw: Random) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        for _ in range(draw.choice((1, 2, 40))):
            items[_value(key, draw)] = _value(value, draw)
    elif field.message_type is None:
        items.extend([_value(field, draw)] * draw.choice((1, 2, 40)))
    elif items and draw.random() < 0.8:
        changed(draw.choice(items), draw)
    elif items and draw.random() < 0.5:
        items.add().CopyFrom(draw.choice(items))
    else:
        changed(items.add(), draw)


def _value(field: FieldDescriptor, draw: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return draw.choice((draw.choice(FLOATS), draw.choice(NOT_FINITE), draw.uniform(-3, 3)))
        case FieldDescriptor.CPPTYPE_STRING:
            is_bytes = field.type == FieldDescriptor.TYPE_BYTES
            return draw.randbytes(draw.choice((0, 3, 192))) if is_bytes else draw.choice(STRINGS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case FieldDescriptor.CPPTYPE_UINT32:
            return draw.choice((*INTEGERS, 2**32 - 1, draw.getrandbits(32)))
        case FieldDescriptor.CPPTYPE_UINT64:
            return draw.choice((*INTEGERS, 2**64 - 1, draw.getrandbits(64)))
        case _:
            return draw.choice((*INTEGERS, -1))


def garbled(data: bytes, draw: Random) -> bytes:
    """The bytes with some of them changed, cut off, or repeated."""
    some = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        if some:
            some[draw.randrange(len(some))] = draw.randrange(256)
    return bytes(draw.choice((some, some[: len(some) // 2], some + some)))
