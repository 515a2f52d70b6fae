"""The shards of a cluster in this process, without a gateway, with gRPC between them on free loopback ports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch.channels import open_channel
from stitch.cluster import ClusterConfig, load_cluster
from stitch.sampling import Sampling
from stitch.telemetry import NO_TRACES, Tracer
from stitch.v1 import shard_pb2, shard_pb2_grpc
from stitch_server.config import ShardSettings
from stitch_server.server import RunningShard, open_shard

ANY_PORT = "127.0.0.1:0"


# After this many answers of one token, the expected length of the next one is one token.
BRIEF_ANSWERS = 24


@dataclass(frozen=True)
class Shards:
    """The running shards by name, and a stub for each."""

    cluster: ClusterConfig
    running: dict[str, RunningShard]
    stubs: dict[str, shard_pb2_grpc.ShardAsyncStub]

    def address(self, name: str) -> str:
        """`host:port` of a shard."""
        return f"127.0.0.1:{self.running[name].port}"

    def chain(self, route: str) -> list[str]:
        """The names of a route's shards: the first replica of each stage."""
        return [stage[0].name for stage in self.cluster.stages(self.cluster.route(route))]

    async def generate(
        self, token_ids: Sequence[int], route: str, count: int, chain: Sequence[str] | None = None, **sampling: Any
    ) -> list[int]:
        """Returns the `count` tokens after `token_ids`, past any end token. Raises grpc.aio.AioRpcError."""
        return await self.replay(token_ids, (), route, count, chain, **sampling)

    async def replay(
        self,
        token_ids: Sequence[int],
        generated: Sequence[int],
        route: str,
        count: int,
        chain: Sequence[str] | None = None,
        **sampling: Any,
    ) -> list[int]:
        """Returns the tokens after those `generated` for a prompt, up to `count` with them."""
        first, *rest = chain or self.chain(route)
        request = shard_pb2.ShardGenerateRequest(
            token_ids=[*token_ids, *generated],
            prompt_tokens=len(token_ids),
            route=route,
            chain=rest,
            sampling=Sampling(max_tokens=count, **sampling).to_proto(),
        )
        return [token.id async for response in self.stubs[first].Generate(request) for token in response.tokens]

    async def answer_briefly(self, route: str) -> None:
        """Lets the first shard expect short answers, so that it admits sessions whose answers do not fit together."""
        for _ in range(BRIEF_ANSWERS):
            await self.generate([1], route, 1)

    async def generate_with_probe(
        self, token_ids: Sequence[int], count: int, **sampling: Any
    ) -> tuple[shard_pb2.ProbeDecision, list[int]]:
        """Generates without naming a route; returns the decision of the first shard's probe, and the tokens."""
        request = shard_pb2.ShardGenerateRequest(
            token_ids=token_ids,
            prompt_tokens=len(token_ids),
            sampling=Sampling(max_tokens=count, **sampling).to_proto(),
        )
        for route in self.cluster.routes:
            _, *rest = self.chain(route.name)
            request.candidates.add(route=route.name, chain=rest)
        responses = [response async for response in self.stubs[self.chain(route.name)[0]].Generate(request)]
        (decision,) = (response.decision for response in responses if response.HasField("decision"))
        return decision, [token.id for response in responses for token in response.tokens]

    def kv_usage(self) -> dict[str, float]:
        """The share of KV blocks that sessions hold, by shard."""
        return {name: shard.shard.pool.usage for name, shard in self.running.items()}


@asynccontextmanager
async def open_shards(cluster_file: Path, tracer: Tracer = NO_TRACES) -> AsyncIterator[Shards]:
    """Starts all shards of a cluster file, and stops them after the block; `tracer` records their sessions."""
    cluster = load_cluster(str(cluster_file))
    async with AsyncExitStack() as stack:
        running: dict[str, RunningShard] = {}
        stubs: dict[str, shard_pb2_grpc.ShardAsyncStub] = {}
        # The first shard of a chain is stopped first.
        for config in reversed(cluster.shards):
            # Each shard knows the ports of those that follow it.
            settings = ShardSettings(
                cluster=_with_ports(cluster, running), shard=config, listen=ANY_PORT, metrics_port=0
            )
            running[config.name] = await stack.enter_async_context(open_shard(settings, tracer=tracer))
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{running[config.name].port}"))
            stubs[config.name] = shard_pb2_grpc.ShardStub(channel)
        yield Shards(_with_ports(cluster, running), running, stubs)


def _with_ports(cluster: ClusterConfig, running: Mapping[str, RunningShard]) -> ClusterConfig:
    """The cluster with the addresses of the shards that run."""
    shards = [
        one.model_copy(update={"address": f"127.0.0.1:{running[one.name].port}"}) if one.name in running else one
        for one in cluster.shards
    ]
    return cluster.model_copy(update={"shards": tuple(shards)})
