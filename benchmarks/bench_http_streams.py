"""What do streams over HTTP cost beside the same over gRPC? TTFT of 50 at a time, and the gateway's CPU time.

A tiny random pair computes, so that little of the time is the shards'. Rounds over both protocols alternate; requests
of a round begin 10 ms apart, so that none waits for a client that is sending others. The cost of HTTP in TTFT is the
difference of the medians; in CPU time it is the ratio of the gateway's CPU seconds for a round.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from statistics import median

import psutil

from benchmarks.clusters import run, running
from benchmarks.report import Options, options, ratio, write
from stitch.client import AsyncClient, Delta
from stitch.cluster import load_cluster
from stitch.tls import GATEWAY
from tests.support.tiny_cluster import write_tiny_cluster

STREAMS, TOKENS, ROUNDS = 50, 64, 12
INTERVAL_SECONDS = 0.01
ROUTE = "weak"
# Answers one request, and returns the milliseconds to its first text.
Ask = Callable[[int], Awaitable[float]]


async def measure(options: Options) -> None:
    """Alternates rounds of both protocols; the first round of each is not counted."""
    streams, rounds = (4, 1) if options.tiny else (STREAMS, ROUNDS)
    samples: dict[str, list[float]] = {
        f"{name}, {what}": [] for name in ("gRPC", "HTTP") for what in ("TTFT, ms", "CPU, s")
    }
    with tempfile.TemporaryDirectory() as folder, running(load_cluster(str(write_tiny_cluster(Path(folder))))) as local:
        gateway, http = psutil.Process(local.processes[GATEWAY].pid), local.cluster.gateway.http
        if http is None:
            raise ValueError("the cluster has no HTTP port")
        async with AsyncClient(local.gateway) as client:
            connections = [HttpConnection(http) for _ in range(streams)]
            asks: dict[str, Ask] = {
                "gRPC": lambda number: _ask_over_grpc(client, number),
                "HTTP": lambda number: connections[number].ask(number),
            }
            for number in range(rounds + 1):
                for name, ask in asks.items():
                    before = sum(gateway.cpu_times()[:2])
                    times = await asyncio.gather(*(_ask_in_turn(ask, one) for one in range(streams)))
                    if number:
                        samples[f"{name}, CPU, s"].append(sum(gateway.cpu_times()[:2]) - before)
                        samples[f"{name}, TTFT, ms"] += times
            for connection in connections:
                await connection.close()
    cost = median(samples["HTTP, TTFT, ms"]) - median(samples["gRPC, TTFT, ms"])
    print(f"  TTFT over HTTP - over gRPC: {cost:.2f} ms")
    ratios = {"gateway CPU, HTTP / gRPC": ratio(samples["HTTP, CPU, s"], samples["gRPC, CPU, s"])}
    write(options, samples, ratios, ttft_difference_ms=cost, streams=streams, tokens=TOKENS)


async def _ask_in_turn(ask: Ask, number: int) -> float:
    await asyncio.sleep(number * INTERVAL_SECONDS)
    return await ask(number)


def _messages(number: int) -> list[dict[str, str]]:
    """A conversation that shares no long prefix with the others."""
    return [{"role": "user", "content": f"{number:02d} stitch"}]


async def _ask_over_grpc(client: AsyncClient, number: int) -> float:
    began, first = time.perf_counter(), 0.0
    stream = client.stream(messages=_messages(number), route=ROUTE, max_tokens=TOKENS, ignore_eos=True)
    async with aclosing(aiter(stream)) as events:
        async for event in events:
            if isinstance(event, Delta) and event.text and not first:
                first = time.perf_counter()
    return (first - began) * 1e3


class HttpConnection:
    """A connection that carries one stream after the other, read with as little work as possible."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, number: int) -> float:
        """Reads one stream to its end, and returns the milliseconds to its first text."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, int(self._port))
        reader, writer = self._streams
        began, first = time.perf_counter(), 0.0
        writer.write(_request(number))
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            if b'"content"' in await reader.readexactly(size + 2) and not first:
                first = time.perf_counter()
        await reader.readline()
        return (first - began) * 1e3

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()


def _request(number: int) -> bytes:
    # Greedy, as gRPC's default is.
    sampling = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"model": ROUTE, "messages": _messages(number), "stream": True, **sampling}).encode()
    fields = f"host: gateway\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + fields.encode() + body


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
