"""What the options of channels and servers do on a connection that stalls, is far away, or has nothing to say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from stitch.certificates import Certificates
from stitch.channels import KEEPALIVE_MS, open_channel, open_server
from stitch.cluster import load_cluster
from stitch.tls import TlsFiles
from tests.support.certificates import write_certificates
from tests.support.listening import listening
from tests.support.tcp_gate import TcpGate

DETECTED_SECONDS = 5.0
ROUND_TRIP_SECONDS = 0.25
CONNECTED_SECONDS = 5.0


async def length(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return str(len(request)).encode()


async def first_word(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.Event().wait()


@asynccontextmanager
async def gated_server(certificates: Certificates | None = None) -> AsyncIterator[TcpGate]:
    """A gate to a server of both methods."""
    server = open_server()
    methods = {
        "Length": grpc.unary_unary_rpc_method_handler(length),
        "Words": grpc.unary_stream_rpc_method_handler(first_word),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", methods),))
    credentials = None if certificates is None else certificates.to_programs()
    async with listening(server, credentials) as address:
        with TcpGate(address) as gate:
            yield gate
            gate.heal()


@pytest.mark.slow
async def test_stalled_connection_ends_its_calls() -> None:
    async with gated_server() as gate, open_channel(gate.address) as channel:
        call = channel.unary_stream("/t.T/Words")(b"")
        assert await call.read() == b"first"
        gate.stall()
        stalled = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError, match="ping timeout") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - stalled < DETECTED_SECONDS


@pytest.mark.slow
async def test_idle_connection_is_kept() -> None:
    async with gated_server() as gate, open_channel(gate.address) as channel:
        call = channel.unary_stream("/t.T/Words")(b"")
        assert await call.read() == b"first"
        # The third ping without data would be one too many for a server that counts them.
        await asyncio.sleep(4.5 * KEEPALIVE_MS / 1_000)
        assert not call.done()
        assert (await channel.unary_unary("/t.T/Length")(b"abc"), gate.accepted) == (b"3", 1)


async def test_connection_with_tls_is_made_over_long_round_trip(tmp_path: Path) -> None:
    cluster = load_cluster("smollm2")
    certificates = Certificates(cluster, TlsFiles(**write_certificates(cluster, tmp_path)), "shard", "top-0")
    async with gated_server(certificates) as gate:
        gate.delay(ROUND_TRIP_SECONDS / 2)
        async with certificates.open_channel("top-0", gate.address) as channel:
            # Without waiting for a connection: the first attempt succeeds, or the call fails.
            assert await channel.unary_unary("/t.T/Length")(b"abc", timeout=CONNECTED_SECONDS) == b"3"
        assert gate.accepted == 1
