"""What does a slow link cost? Time per token over links with a round trip of 0, 5 and 20 ms, in alternation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from statistics import mean, median

from benchmarks.bench_hop import HIDDEN_BYTES, REPLY_BYTES
from benchmarks.clusters import first_shard, not_started, preset, prompt, quiet, run
from benchmarks.report import Options, options, write
from benchmarks.slow_link import SlowLink, slow_link
from benchmarks.steps import Step, step_logs
from benchmarks.tcp_echo import Echo, tcp_echo
from stitch.cluster import ClusterConfig
from stitch.local.cluster import LocalCluster, keep_port

# Round trip in milliseconds, bits per second.
LINKS = ((0, 1e9), (5, 1e9), (20, 1e9), (20, 1e8))
PROMPT_TOKENS = 512
TRIPS = 8
# About the time of a token's passes: a round trip after a pause is slower than one right after another.
PAUSE_SECONDS = 0.025


async def measure(options: Options) -> None:
    """Samples time per token, the forward passes in it, and a bare round trip over a link of the same kind.

    `added` is the time per token beyond that without a round trip, `outside_passes` the time beyond its passes, and
    `beyond_the_link` what remains of that without a bare round trip.
    """
    rounds, decoded = (1, 4) if options.tiny else (7, 32)
    cluster = preset()
    top = next(shard.name for shard in cluster.shards if shard.role == "top")
    samples: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        logs = stack.enter_context(step_logs())
        local, link = await stack.enter_async_context(running_over_slow_link(cluster, top))
        shard = await stack.enter_async_context(first_shard(local))
        server = stack.enter_context(tcp_echo(HIDDEN_BYTES, REPLY_BYTES))
        bare = await stack.enter_async_context(slow_link(server.address))
        echo = stack.enter_context(server.connected(bare.address))
        for index in range(rounds + 1):
            for number, (round_trip_ms, rate) in enumerate(LINKS):
                for one in (link, bare):
                    one.round_trip_seconds, one.bits_per_second = round_trip_ms / 1e3, rate
                timed = await shard.generate(prompt(PROMPT_TOKENS, index * 10 + number), decoded)
                values = {
                    "ms per token": timed.token_ms,
                    "ms per token in passes": _computing(logs.read(), decoded - 1),
                    "bare round trip, ms": await _trip(echo),
                    f"TTFT at {PROMPT_TOKENS}, ms": timed.ttft_ms,
                }
                for what, value in values.items() if index else ():
                    samples.setdefault(f"{_name(round_trip_ms, rate)}: {what}", []).append(value)
    figures = _figures({name: median(values) for name, values in samples.items()})
    write(options, samples, {}, **figures)
    for what, of_links in figures.items():
        for name, milliseconds in of_links.items():
            print(f"  {f'{name}: {what}':<60} {milliseconds:10.2f} ms")


@asynccontextmanager
async def running_over_slow_link(cluster: ClusterConfig, shard: str) -> AsyncIterator[tuple[LocalCluster, SlowLink]]:
    """Runs the cluster; all others reach that shard over the link, which has its address in the cluster file."""
    with not_started(cluster) as local, ExitStack() as bound:
        _, _, port = local.address(shard).rpartition(":")
        local.listen[shard] = f"127.0.0.1:{keep_port(bound)}"
        async with slow_link(local.listen[shard], int(port)) as link:
            # The link runs in this event loop.
            await asyncio.to_thread(local.start_all, quiet)
            yield local, link


def _name(round_trip_ms: float, rate: float) -> str:
    return f"{round_trip_ms} ms, {rate / 1e6:g} Mbit/s"


def _computing(steps: Mapping[str, Sequence[Step]], tokens: int) -> float:
    """The mean computing time per token over the latest passes, summed over all shards."""
    return sum(mean(one.milliseconds for one in logged[-tokens:]) for logged in steps.values())


async def _trip(echo: Echo) -> float:
    """Milliseconds of a bare round trip; the echo blocks in a thread, since the link runs in this event loop."""
    trips = []
    for _ in range(TRIPS):
        await asyncio.sleep(PAUSE_SECONDS)
        trips.append(await asyncio.to_thread(echo.seconds))
    return median(trips) * 1e3


def _figures(medians: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds by figure and link."""
    names = [_name(*link) for link in LINKS]
    token = {name: medians[f"{name}: ms per token"] for name in names}
    outside = {name: token[name] - medians[f"{name}: ms per token in passes"] for name in names}
    return {
        "added": {name: token[name] - token[names[0]] for name in names},
        "outside_passes": outside,
        "beyond_the_link": {name: outside[name] - medians[f"{name}: bare round trip, ms"] for name in names},
    }


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
