"""Token streams over fake shards, which a test makes fail, drain or refuse."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from router_gateway.metrics import REPLAY_CAUSES, Metrics
from router_gateway.requests.failover import Failover, FailoverDependencies, RetryPolicy
from router_gateway.requests.stream import Step, StreamInput, TokenStream
from router_gateway.routing.router import RouteDecision
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.placement import Placement
from router_gateway.shards.progress import ProgressMonitor
from router_gateway.shards.replica import Replica
from stitch.process import background_tasks
from stitch.sampling import Sampling
from tests.support.fake_shard import END_TOKEN, FakeShard
from tests.support.registries import QUICK, registry_of

# What every bottom shard generates before the end token.
SCRIPT = [11, 12, 13, 14, 15, 16]
PROMPT = (5, 6, 7)


def stream_input(**sampling: Any) -> StreamInput:
    """An answer to PROMPT on the strong route; fields of its sampling are given by name."""
    filled = Sampling(stop_token_ids=(END_TOKEN,), **sampling)
    return StreamInput("id", PROMPT, RouteDecision("strong", 0.9, "", "content"), filled)


class StreamBench:
    """Streams over fake shards, with the metrics that they count."""

    def __init__(self, dependencies: FailoverDependencies, metrics: Metrics) -> None:
        self._dependencies = dependencies
        self._metrics = metrics

    def steps(self, given: StreamInput, deadline: float | None = None) -> aclosing[AsyncGenerator[Step]]:
        failover = Failover(given.routes, self._dependencies, given.facts)
        return aclosing(TokenStream(given, failover, deadline, self._dependencies.clock).steps())

    async def all(self, given: StreamInput | None = None, deadline: float | None = None) -> list[Step]:
        """All steps of one answer. Raises the error with which it ends."""
        async with self.steps(given or stream_input(), deadline) as steps:
            return [step async for step in steps]

    def replica(self, name: str) -> Replica:
        return self._dependencies.registry.replicas[name]

    async def refresh(self) -> None:
        await self._dependencies.registry.refresh()

    @property
    def drain_refusals(self) -> float | None:
        return self._metrics.registry.get_sample_value("stitch_drain_refusals_total")

    @property
    def replays(self) -> dict[str, float]:
        """The number of replays by cause, of those that there were."""
        value = self._metrics.registry.get_sample_value
        counts = {cause: value("stitch_replays_total", {"cause": cause}) or 0 for cause in REPLAY_CAUSES}
        return {cause: count for cause, count in counts.items() if count}


@asynccontextmanager
async def streaming(
    *shards: FakeShard,
    wait_seconds: float = 5.0,
    max_failures: int = 5,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[StreamBench]:
    """Streams over these shards, which are polled once; the time between tries is short."""
    metrics = Metrics(["weak", "strong"], ["requested"])
    async with registry_of(*shards, metrics=metrics) as (_, registry):
        await registry.refresh()
        policy = RetryPolicy(wait_seconds=wait_seconds, first_pause_seconds=0.005, max_failures=max_failures)
        placement = Placement(registry)
        progress = ProgressMonitor(placement, QUICK, EjectionPolicy())
        dependencies = FailoverDependencies(registry, placement, metrics, policy, clock)
        async with background_tasks(progress.run()):
            yield StreamBench(dependencies, metrics)


def bottoms(count: int) -> list[FakeShard]:
    return [FakeShard(f"bottom-{index}", "bottom", SCRIPT) for index in range(count)]


def top() -> FakeShard:
    return FakeShard("top-0", "top")


def ids(steps: list[Step]) -> list[int]:
    """The token ids of an answer."""
    return [token.id for step in steps for token in step.tokens]
