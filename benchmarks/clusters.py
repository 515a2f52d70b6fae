"""Local clusters for benchmarks, and a client that sends token ids to their first shard."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from stitch.channels import open_channel
from stitch.cluster import BatchingConfig, ClusterConfig, load_cluster
from stitch.local.cluster import LocalCluster, import_models, prepared
from stitch.local.run_folder import RunFolder
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc


def preset(name: str = "smollm2", **fields: Any) -> ClusterConfig:
    """A preset with the given fields of `[batching]` and `[compute]`."""
    cluster = load_cluster(name)
    batching = {field: fields.pop(field) for field in BatchingConfig.model_fields if field in fields}
    changed = {
        "batching": cluster.batching.model_copy(update=batching),
        "compute": cluster.compute.model_copy(update=fields),
    }
    return cluster.model_copy(update=changed)


@contextmanager
def running(cluster: ClusterConfig) -> Iterator[LocalCluster]:
    """Runs the cluster as processes of this machine, all of which serve inside the block."""
    with not_started(cluster) as local:
        local.start_all(quiet)
        yield local


@contextmanager
def not_started(cluster: ClusterConfig) -> Iterator[LocalCluster]:
    """The cluster with free ports, before any process starts; those that run at the end of the block are stopped."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as bound:
        local = prepared(cluster, RunFolder(Path(folder)), bound)
        # The written cluster's: sources that are relative to its file are whole there.
        import_models(local.cluster, quiet)
        try:
            yield local
        finally:
            local.stop()


@dataclass(frozen=True, slots=True)
class Timed:
    """One generation: its tokens, and the arrival of each in seconds after the request."""

    token_ids: list[int]
    arrivals: list[float]

    @property
    def ttft_ms(self) -> float:
        return self.arrivals[0] * 1e3

    @property
    def token_ms(self) -> float:
        """The mean time per token after the first, in milliseconds."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1) * 1e3


class FirstShard:
    """A client of the first shard of a route, with token ids in and out and no gateway."""

    def __init__(self, stub: shard_pb2_grpc.ShardAsyncStub, cluster: ClusterConfig) -> None:
        self._stub = stub
        self._cluster = cluster

    async def generate(
        self,
        token_ids: Sequence[int],
        tokens: int,
        route: str = "strong",
        arrived: Callable[[], None] | None = None,
        grammar: shard_pb2.Grammar | None = None,
    ) -> Timed:
        """Generates exactly `tokens` tokens greedily; calls `arrived` at every reply with tokens."""
        stages = self._cluster.stages(self._cluster.route(route))
        request = shard_pb2.ShardGenerateRequest(
            token_ids=token_ids,
            prompt_tokens=len(token_ids),
            route=route,
            chain=[replicas[0].name for replicas in stages[1:]],
            sampling=inference_pb2.Sampling(max_tokens=tokens),
            grammar=grammar,
        )
        started = time.perf_counter()
        timed = Timed([], [])
        async for response in self._stub.Generate(request):
            timed.token_ids.extend(token.id for token in response.tokens)
            timed.arrivals.extend(time.perf_counter() - started for _ in response.tokens)
            if arrived is not None and response.tokens:
                arrived()
        return timed


@asynccontextmanager
async def first_shard(local: LocalCluster, route: str | None = None) -> AsyncIterator[FirstShard]:
    """A client of the shard with the embedding of a route, by default the costliest one."""
    cluster = local.cluster
    first = cluster.stages(cluster.routes[-1] if route is None else cluster.route(route))[0][0]
    async with open_channel(first.address) as channel:
        stub: shard_pb2_grpc.ShardAsyncStub = shard_pb2_grpc.ShardStub(channel)
        yield FirstShard(stub, local.cluster)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Token ids of ordinary words, different for every seed; speed doesn't depend on them."""
    return [1000 + (seed * 7919 + index * 31) % 20000 for index in range(tokens)]


def quiet(name: str, progress: str | float) -> None:
    """Benchmarks print figures only."""


def run(question: Coroutine[Any, Any, None]) -> None:
    """Runs a benchmark's coroutine; SIGTERM cancels it, so that it stops the processes that it has started."""
    uvloop.run(_until_terminated(question))


async def _until_terminated(question: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(question)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task
