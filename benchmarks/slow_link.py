"""A TCP proxy with a round-trip time and a rate, for machines whose kernel has no netem.

Bytes that one side writes arrive at the other half a round trip later, and no faster than the rate. TCP's own slow
start isn't modelled, since both sockets are on this machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

CHUNK_BYTES = 16 * 1024
# The chunks in flight in one direction before the sender has to wait.
MAX_CHUNKS = 256
# The event loop's timers are coarser than a link, so the last part of a delay blocks in `time.sleep`.
TIMER_SECONDS = 0.0015


@dataclass(slots=True)
class SlowLink:
    """A link whose fields can change at any time; they apply to bytes written from then on."""

    address: str
    round_trip_seconds: float = 0.0
    bits_per_second: float = 1e9


@asynccontextmanager
async def slow_link(to: str, port: int = 0) -> AsyncIterator[SlowLink]:
    """A port of this machine, any free one for 0, whose connections are forwarded to `to`, `host:port`."""
    host, _, target = to.rpartition(":")
    link = SlowLink("")
    pumps: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, back = await asyncio.open_connection(host, int(target))
        for source, sink in ((reader, back), (upstream, writer)):
            pumps.add(asyncio.create_task(_pump(link, source, sink)))

    server = await asyncio.start_server(accepted, "127.0.0.1", port)
    link.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield link
    finally:
        server.close()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(link: SlowLink, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
    arriving = asyncio.create_task(_arrive(in_flight, sink))
    clock = asyncio.get_running_loop().time
    sent = 0.0
    try:
        while chunk := await source.read(CHUNK_BYTES):
            sent = max(sent, clock()) + 8 * len(chunk) / link.bits_per_second
            await in_flight.put((sent + link.round_trip_seconds / 2, chunk))
        await in_flight.put((clock(), b""))
        await arriving
    finally:
        arriving.cancel()
        sink.close()


async def _arrive(in_flight: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
    clock = asyncio.get_running_loop().time
    with suppress(ConnectionError):
        while True:
            due, chunk = await in_flight.get()
            await asyncio.sleep(max(0.0, due - clock() - TIMER_SECONDS))
            time.sleep(max(0.0, due - clock()))  # noqa: ASYNC251
            if not chunk:
                sink.close()
                return
            sink.write(chunk)
            await sink.drain()
