"""Tests of reading the wire format: fields, their number within messages, and bytes that are no message."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from router_gateway.rpc.wire_format import Field, fields, has_more_fields
from stitch.v1 import inference_pb2

CHAT = inference_pb2.GenerateRequest(
    chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x" * 300)] * 5),
    sampling=inference_pb2.Sampling(temperature=0.5, seed=1 << 60),
)


def test_fields_are_those_of_the_message_in_order() -> None:
    data = CHAT.SerializeToString()
    chat, sampling = fields(data, 0, len(data))
    assert (chat.number, sampling.number) == (2, 3)
    assert data[chat.start : chat.end] == CHAT.chat.SerializeToString()
    assert data[sampling.start : sampling.end] == CHAT.sampling.SerializeToString()


def test_fields_of_every_wire_type_are_read() -> None:
    data = CHAT.sampling.SerializeToString() + b"\x7d\x00\x00\x00\x00" + b"\x4a\x00"
    assert [field.number for field in fields(data, 0, len(data))] == [1, 8, 15, 9]
    assert list(fields(b"\x0a\x01x", 0, 3)) == [Field(1, True, 2, 3)]


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x02x", b"\x0b", b"\x80" * 11 + b"\x00", b"\x09\x00", b"\xff\xff"])
def test_bytes_that_are_no_message_raise(data: bytes) -> None:
    with pytest.raises(DecodeError):
        list(fields(data, 0, len(data)))


def test_fields_are_counted_at_every_depth() -> None:
    # chat, sampling, five messages with two fields each, and two fields of the sampling.
    data = CHAT.SerializeToString()
    assert not has_more_fields(data, inference_pb2.GenerateRequest, 19)
    assert has_more_fields(data, inference_pb2.GenerateRequest, 18)


def test_text_that_looks_like_fields_is_not_counted() -> None:
    data = inference_pb2.GenerateRequest(prompt="\n\x00" * 1_000).SerializeToString()
    assert not has_more_fields(data, inference_pb2.GenerateRequest, 1)


def test_counting_ends_at_the_first_error() -> None:
    assert not has_more_fields(b"\x0a\x00\xff\xff", inference_pb2.GenerateRequest, 1)
