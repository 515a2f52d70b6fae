"""Channels and servers with the options that both ends share."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from stitch.channels import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, listen, open_channel, open_server, open_sync_channel
from stitch.errors import InvalidRequest
from tests.support.listening import listening


async def length(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return str(len(request)).encode()


def length_server() -> grpc.aio.Server:
    handler = grpc.method_handlers_generic_handler("t.T", {"Length": grpc.unary_unary_rpc_method_handler(length)})
    server = open_server()
    server.add_generic_rpc_handlers((handler,))
    return server


async def test_message_beyond_grpc_default_limit_passes() -> None:
    async with listening(length_server()) as address, open_channel(address) as channel:
        assert await channel.unary_unary("/t.T/Length")(bytes(5 << 20)) == str(5 << 20).encode()


async def test_message_beyond_limit_is_refused() -> None:
    async with listening(length_server()) as address, open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t.T/Length")(bytes(MAX_MESSAGE_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


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


VARIABLES = ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpProxy]:
    """A proxy that no variable names."""
    for name in (*VARIABLES, "no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HttpProxy() as proxy:
        yield proxy


async def test_channels_are_direct_whatever_proxy_is_set(proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, proxy.url)
    async with listening(length_server()) as address:
        async with open_channel(address) as channel:
            assert await channel.unary_unary("/t.T/Length")(b"abc") == b"3"
        with open_sync_channel(address) as blocking:
            assert await asyncio.to_thread(blocking.unary_unary("/t.T/Length"), b"abc") == b"3"
    assert proxy.asked == []


@pytest.mark.parametrize("variable", VARIABLES)
async def test_channel_with_proxy_connects_through_it(
    proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    async with listening(length_server()) as address, open_channel(address, proxy=True) as channel:
        assert await channel.unary_unary("/t.T/Length")(b"abc", timeout=20) == b"3"
    assert proxy.asked == [address]


async def test_proxy_without_variable_is_refused(proxy: HttpProxy) -> None:
    with pytest.raises(InvalidRequest, match="proxy is True, but none of grpc_proxy, https_proxy"):
        open_channel("127.0.0.1:1", proxy=True)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "socks5://127.0.0.1:1", "127.0.0.1:1"])
def test_proxy_of_other_protocol_is_refused(proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("https_proxy", url)
    with pytest.raises(InvalidRequest, match=f"https_proxy is '{url}', but the URL of a proxy must start with http://"):
        open_sync_channel("127.0.0.1:1", proxy=True)


class HttpProxy:
    """An HTTP proxy on a port of its own, with the addresses to which its clients asked to be connected."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pool = ThreadPoolExecutor(8)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> HttpProxy:
        self._pool.submit(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._pool.shutdown()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._pool.submit(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        address = client.recv(4096).split()[1].decode()
        self.asked.append(address)
        host, _, port = address.rpartition(":")
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        forward = self._pool.submit(_copy, client, server)
        _copy(server, client)
        forward.result()
        client.close()
        server.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
        target.shutdown(socket.SHUT_RDWR)
