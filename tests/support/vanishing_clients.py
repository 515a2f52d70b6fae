"""Clients that vanish in the middle of an answer: they cancel, lose their connection, or are killed.

They speak gRPC or HTTP. As a program, `python -m tests.support.vanishing_clients PROTOCOL ADDRESS COUNT` opens that
many answers, prints a line, and reads until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import psutil

from stitch.client import AsyncClient
from stitch.errors import StitchError
from tests.support.processes import GATEWAY, Cluster
from tests.support.tcp_gate import TcpGate

ROOT = Path(__file__).parents[2]
# Clients that lose one connection together, or are one process.
GROUP = 10
AT_A_TIME = 40
# All of an answer takes longer.
LIFE_SECONDS = 0.3
SCRAPED_SECONDS = 0.1
ANSWER_TOKENS = 400


def request(draw: Random) -> dict[str, Any]:
    """A long answer, to a short or a long prompt."""
    return {
        "prompt": "".join(draw.choices("abcdefgh", k=draw.choice((5, 50, 500)))),
        "route": draw.choice(("weak", "strong")),
        "temperature": draw.choice((0.0, 1.0)),
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
    }


# Reads one answer to its end, or until the connection ends.
Read = Callable[[Random], Awaitable[None]]


@asynccontextmanager
async def grpc_reader(address: str) -> AsyncIterator[Read]:
    """Reads answers over gRPC, all over one connection."""

    async def read(draw: Random) -> None:
        with suppress(StitchError):
            async with aclosing(aiter(client.stream(**request(draw)))) as events:
                async for _ in events:
                    pass

    async with AsyncClient(address) as client:
        yield read


@asynccontextmanager
async def http_reader(address: str) -> AsyncIterator[Read]:
    """Reads answers over HTTP, half of them as a stream, each over a connection of its own."""

    async def read(draw: Random) -> None:
        fields = request(draw) | {"stream": draw.random() < 0.5}
        fields["model"] = fields.pop("route")
        fields["messages"] = [{"role": "user", "content": fields.pop("prompt")}]
        with suppress(httpx2.HTTPError):
            await client.post("/v1/chat/completions", json=fields)

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=f"http://{address}", timeout=60, limits=limits, trust_env=False) as client:
        yield read


READERS = {"grpc": grpc_reader, "http": http_reader}


async def vanish(cluster: Cluster, count: int, seed: int, protocol: str = "grpc") -> None:
    """`count` clients come and vanish: six of ten cancel, three lose their connection, one is killed."""
    address = cluster.gateway if protocol == "grpc" else cluster.http
    draw, room = Random(seed), asyncio.Semaphore(AT_A_TIME // GROUP)
    kinds = [_cancel] * 6 + [_cut] * 3 + [_kill]

    async def one_group(kind: Any, own: Random) -> None:
        async with room:
            await kind(protocol, address, own)

    groups: list[Coroutine[Any, Any, None]] = [
        one_group(kinds[number % len(kinds)], Random(draw.random())) for number in range(count // GROUP)
    ]
    await asyncio.gather(*groups)


async def _cancel(protocol: str, address: str, draw: Random) -> None:
    """Every client at a moment of its own."""
    async with READERS[protocol](address) as read:
        reading = [asyncio.create_task(_read_for(draw.uniform(0, LIFE_SECONDS), read, draw)) for _ in range(GROUP)]
        await asyncio.gather(*reading)


async def _read_for(seconds: float, read: Read, draw: Random) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await read(draw)


async def _cut(protocol: str, address: str, draw: Random) -> None:
    """All connections are reset at the same time."""
    async with AsyncExitStack() as stack:
        gate = stack.enter_context(TcpGate(address))
        read = await stack.enter_async_context(READERS[protocol](gate.address))
        reading = [asyncio.ensure_future(read(draw)) for _ in range(GROUP)]
        await asyncio.sleep(draw.uniform(0, LIFE_SECONDS))
        await asyncio.to_thread(gate.cut)
        await asyncio.gather(*reading)


async def _kill(protocol: str, address: str, draw: Random) -> None:
    """All in one process, which is killed."""
    command = [sys.executable, "-m", __name__, protocol, address, str(GROUP)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"reading\n"
    await asyncio.sleep(draw.uniform(0, LIFE_SECONDS))
    process.kill()
    await process.wait()


def holds_nothing(cluster: Cluster) -> bool:
    """Whether no session and no request is left."""
    shards = [name for name in cluster.names if name != GATEWAY]
    held = [cluster.metric(name, "stitch_kv_cache_usage_ratio") for name in shards]
    sessions = [cluster.metric(name, f"stitch_sessions_{state}") for name in shards for state in ("running", "waiting")]
    requests = [cluster.metric(GATEWAY, f"stitch_requests_{state}") for state in ("running", "waiting")]
    return not any((*held, *sessions, *requests))


class Footprint:
    """What a cluster's processes hold now."""

    def __init__(self, cluster: Cluster) -> None:
        processes = {name: psutil.Process(cluster.pid(name)) for name in cluster.names}
        self.tasks = {name: cluster.metric(name, "stitch_event_loop_tasks") for name in processes}
        # The scrape itself holds a connection for a moment.
        time.sleep(SCRAPED_SECONDS)
        self.descriptors = {name: process.num_fds() for name, process in processes.items()}
        self.threads = {name: process.num_threads() for name, process in processes.items()}
        self.resident_mb = {name: process.memory_info().rss / 2**20 for name, process in processes.items()}


async def _read_until_killed(protocol: str, address: str, count: int) -> None:
    async with READERS[protocol](address) as read:
        reading = [asyncio.ensure_future(read(Random(number))) for number in range(count)]
        print("reading", flush=True)
        await asyncio.gather(*reading)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_read_until_killed(sys.argv[1], sys.argv[2], int(sys.argv[3])))
