"""Malformed requests end with the field at fault, not with a transport error."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from router_gateway.rpc.decoding import FAILED, decode, methods_of_inference
from stitch.errors import InvalidRequest, from_rpc_error
from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard
from tests.unit.router_gateway.conftest import Reach

BAD = b"caf\xe9!"


def broken(message: Message) -> bytes:
    """The message on the wire, with `caf??` turned into bytes that are no UTF-8."""
    return message.SerializeToString().replace(b"caf??", BAD)


def chat(content: str) -> inference_pb2.Chat:
    good = inference_pb2.ChatMessage(role="user", content="fine")
    return inference_pb2.Chat(messages=[good, inference_pb2.ChatMessage(role="user", content=content)])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.GenerateRequest(prompt="caf??"), "prompt"),
        (inference_pb2.GenerateRequest(prompt="fine", stop=["a", "caf??"]), "stop[1]"),
        (inference_pb2.GenerateRequest(chat=chat("caf??")), "chat.messages[1].content"),
        (inference_pb2.RouteRequest(prompt="caf??"), "prompt"),
        (
            inference_pb2.GenerateBatchRequest(requests=[inference_pb2.GenerateRequest(route="caf??")]),
            "requests[0].route",
        ),
    ],
)
def test_the_broken_string_is_found_wherever_it_is(message: Message, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(type(message), broken(message))
    assert caught.value.field == field
    assert str(caught.value) == f"{field} is b'caf\\xe9', but it must be UTF-8, and byte 3 is 0xe9"


def test_a_long_string_is_shown_around_its_fault() -> None:
    message = inference_pb2.GenerateRequest(prompt="x" * 1_000_000 + "caf??")
    with pytest.raises(InvalidRequest, match=r"is b'xxxxxxxxxcaf\\xe9', but .* byte 1000003 is 0xe9"):
        decode(inference_pb2.GenerateRequest, broken(message))


def test_bytes_that_are_no_message_are_called_so() -> None:
    with pytest.raises(InvalidRequest, match=r"request is 2 bytes, but they are no stitch\.v1\.GenerateRequest"):
        decode(inference_pb2.GenerateRequest, b"\xff\xff")


def test_a_good_message_is_decoded() -> None:
    message = inference_pb2.GenerateRequest(chat=chat("é你"), stop=["a"])
    assert decode(inference_pb2.GenerateRequest, message.SerializeToString()) == message


def test_every_method_of_the_service_is_covered() -> None:
    methods = methods_of_inference()
    assert methods["/stitch.v1.Inference/GenerateBatch"] is inference_pb2.GenerateBatchRequest
    assert len(methods) == len(inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods)


@pytest.mark.parametrize("method", ["Generate", "GenerateBatch", "Route", "Describe"])
async def test_a_call_with_bytes_that_are_no_message_is_refused(reach: Reach, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(reach, method, b"\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("request is 2 bytes, but")


async def test_a_call_with_invalid_utf8_names_the_field(reach: Reach) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(reach, "Generate", broken(inference_pb2.GenerateRequest(prompt="caf??")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_defect_is_logged_and_its_text_is_not_sent(
    reach: Reach, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    async with reach(FakeShard("bottom-0", "bottom", tokens("hello")), FakeShard("top-0", "top")) as gateway:
        monkeypatch.setattr("router_gateway.rpc.servicer.to_request", defect)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.generate()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, FAILED)
    assert "secret" in caplog.text


async def raw(reach: Reach, method: str, data: bytes) -> None:
    """Sends bytes as they are."""
    async with reach(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as gateway:
        path = f"/stitch.v1.Inference/{method}"
        if method.startswith("Generate"):
            async for _ in gateway.channel.unary_stream(path, None, None)(data):
                pass
        else:
            await gateway.channel.unary_unary(path, None, None)(data)
