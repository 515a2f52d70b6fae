"""What a client of the HTTP port may take: heads, bodies, connections, calls and time are counted before parsing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stitch.cluster import GatewayLimits
from tests.http.conftest import USER, Serve, Served
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, waits_for
from tests.support.openai_replies import chunks
from tests.support.waiting import eventually

BODY = json.dumps({"model": "weak", "messages": USER}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")


class Raw:
    """A connection whose bytes the test writes itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def reply(self) -> tuple[int, bytes]:
        """The status and the body of the next reply, which has a content-length."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        return int(head.split()[1]), await self._reader.readexactly(int(fields[b"content-length"]))

    async def ended(self) -> bool:
        """Whether the gateway closes the connection, without a further byte."""
        try:
            return await self._reader.read() == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def raw(served: Served) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.gateway.http_port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def chat(body: bytes = BODY) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_beyond_its_limit_is_refused(serve: Serve, chunked: bool) -> None:
    async with serve(*shards(), limits=GatewayLimits(request_bytes=2_000)) as served, raw(served) as connection:
        if chunked:
            await connection.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"400\r\n" + bytes(1_024) + b"\r\n")
            await connection.send(b"400\r\n" + bytes(1_024) + b"\r\n0\r\n\r\n")
        else:
            # Refused before it has come.
            await connection.send(HEAD + b"content-length: 2001\r\n\r\n")
        status, body = await connection.reply()
        assert (status, code_of(body)) == (413, "request_too_large")
        if not chunked:
            await connection.send(bytes(2_001))
        await connection.send(chat())
        assert (await connection.reply())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/9.9 and more\r\n\r\n",
    ],
    ids=["many headers", "no HTTP"],
)
async def test_broken_head_is_refused_and_ends_the_connection(serve: Serve, head: bytes) -> None:
    async with serve(*shards()) as served, raw(served) as connection:
        await connection.send(head)
        status, body = await connection.reply()
        assert (status, code_of(body)) == (400, "invalid_http")
        assert await connection.ended()


async def test_endless_head_is_refused(serve: Serve) -> None:
    async with serve(*shards()) as served, raw(served) as connection:
        await connection.send(b"GET /health HTTP/1.1\r\na: ")
        reading = asyncio.create_task(connection.reply())
        while not reading.done():
            await connection.send(bytes([97]) * 20_000)
            await asyncio.sleep(0.001)
        status, body = await reading
    assert (status, code_of(body)) == (400, "invalid_http")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n", HEAD + b"content-length: 9\r\n\r\n1"])
async def test_request_that_does_not_arrive_ends_its_connection(
    serve: Serve, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_gateway.http.server.REFUSAL_SECONDS", 0.3)
    async with serve(*shards(), limits=GatewayLimits(receive_seconds=0.05)) as served, raw(served) as connection:
        await connection.send(sent)
        if sent.startswith(HEAD):
            status, body = await connection.reply()
            assert (status, code_of(body)) == (504, "deadline_exceeded")
        assert await connection.ended()


async def test_connections_beyond_the_most_are_closed(serve: Serve) -> None:
    async with serve(*shards(), limits=GatewayLimits(connections=1)) as served:
        async with raw(served) as first:
            await first.send(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await first.reply())[0] == 200
            async with raw(served) as second:
                assert await second.ended()
        await eventually(lambda: not served.gateway.http.connections)  # type: ignore[union-attr]
        async with raw(served) as third:
            await third.send(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await third.reply())[0] == 200


async def test_calls_and_bytes_are_counted_together_with_grpc(serve: Serve) -> None:
    bottom, top = shards()
    hold = asyncio.Event()
    bottom.faults[0] = waits_for(hold)
    async with serve(bottom, top, limits=GatewayLimits(calls=1, in_flight_bytes=1_024)) as served:
        asking = asyncio.create_task(served.reached.generate())
        await eventually(lambda: not bottom.faults)
        refused = await served.chat()
        hold.set()
        await asking
        large = await served.chat(user="a" * 1_024)
        assert (await served.chat()).status_code == 200
    assert [refused.status_code, large.status_code] == [429, 429]
    assert "1 calls, its most" in refused.json()["error"]["message"]
    assert "bytes of at most 1,024" in large.json()["error"]["message"]


async def test_key_is_asked_for_before_the_body(serve: Serve, tmp_path: Any) -> None:
    (tmp_path / "keys.toml").write_text(f'[tenants.t]\nkeys = ["{"0" * 64}"]\n')
    async with serve(*shards(), keys=str(tmp_path / "keys.toml")) as served, raw(served) as connection:
        await connection.send(HEAD + b"content-length: 100\r\n\r\n")
        status, body = await connection.reply()
        assert (status, code_of(body)) == (401, "invalid_api_key")
        for path in ("/health", "/ready", "/openapi.json"):
            assert (await served.raw.get(path)).status_code == 200


async def test_body_of_another_type_is_refused(serve: Serve) -> None:
    async with serve(*shards()) as served:
        reply = await served.raw.post("/v1/chat/completions", content=BODY, headers={"content-type": "text/plain"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_few_requests_may_be_pipelined(serve: Serve) -> None:
    bottom, top = shards()
    hold = asyncio.Event()
    bottom.faults[0] = waits_for(hold)
    async with serve(bottom, top) as served:
        async with raw(served) as connection:
            await connection.send(chat() * 3)
            await eventually(lambda: not bottom.faults)
            hold.set()
            assert [(await connection.reply())[0] for _ in range(3)] == [200] * 3
        bottom.faults[0] = waits_for(asyncio.Event())
        async with raw(served) as connection:
            await connection.send(chat() * 20)
            while not await connection.ended():
                pass
        await eventually(lambda: bottom.running == 0)


async def test_client_that_reads_nothing_ends_after_its_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_gateway.http.calls.UNREAD_SECONDS", 0.0)
    bottom, top = shards()
    bottom.faults[1] = waits_for(asyncio.Event())
    async with serve(bottom, top) as served, raw(served) as connection:
        body = json.dumps({"model": "weak", "messages": USER, "stream": True}).encode()
        await connection.send(HEAD + b"x-stitch-deadline-seconds: 0.3\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await eventually(lambda: not bottom.faults)
        await eventually(lambda: bottom.running == 0 and not served.gateway.http.connections)  # type: ignore[union-attr]


async def test_broken_requests_write_no_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(*shards()) as served:
        for _ in range(3):
            async with raw(served) as connection:
                await connection.send(b"nonsense\r\n\r\n")
                assert (await connection.reply())[0] == 400
        assert len(chunks((await served.chat(stream=True)).text)) > 1
    assert [record for record in caplog.records if record.name.startswith(("uvicorn", "router_gateway.http"))] == []
