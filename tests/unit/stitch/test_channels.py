"""Channels and servers with the options that both ends share."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from stitch.channels import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, listen, open_channel, open_server, open_sync_channel


async def length(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return str(len(request)).encode()


def length_server() -> grpc.aio.Server:
    handler = grpc.method_handlers_generic_handler("t.T", {"Length": grpc.unary_unary_rpc_method_handler(length)})
    server = open_server()
    server.add_generic_rpc_handlers((handler,))
    return server


async def test_message_beyond_grpc_default_limit_passes() -> None:
    server = length_server()
    port = listen(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary("/t.T/Length")(bytes(5 << 20)) == str(5 << 20).encode()
    await server.stop(None)


async def test_message_beyond_limit_is_refused() -> None:
    server = length_server()
    port = listen(server, "127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t.T/Length")(bytes(MAX_MESSAGE_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(None)


async def test_second_server_on_port_is_refused() -> None:
    first, second = open_server(), open_server()
    port = listen(first, "127.0.0.1:0")
    with pytest.raises(OSError, match=f"can't listen on 127.0.0.1:{port}"):
        listen(second, f"127.0.0.1:{port}")
    await first.stop(None)
    await second.stop(None)


def test_blocking_channel_has_same_options() -> None:
    with open_sync_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/Length")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_frame_limit_is_below_message_limit() -> None:
    assert MAX_FRAME_BYTES < MAX_MESSAGE_BYTES
