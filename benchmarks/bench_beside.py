"""What does a long prompt cost those who decode? One stream's gaps between tokens, idle and beside 2,000 tokens."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from statistics import quantiles

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, write


async def measure(options: Options) -> None:
    """p95 of the gaps between the tokens of one stream, without and with a neighbour's prefill."""
    rounds, length = (1, 300) if options.tiny else (5, 2000)
    idle: list[float] = []
    beside: list[float] = []
    neighbours: list[float] = []
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                alone = await shard.generate(prompt(64), 64)
                gaps, ttft_ms = await _beside(shard, prompt(length, index + 1))
                if index:
                    idle += _gaps_ms(alone.arrivals)
                    beside += gaps
                    neighbours.append(ttft_ms)
    samples = {"idle, ms a token": idle, f"beside {length} tokens of prefill, ms a token": beside}
    ratios = {"p95 beside / p95 idle": _p95(beside) / _p95(idle)}
    write(options, {**samples, f"TTFT of the {length} tokens, ms": neighbours}, ratios)


async def _beside(shard: FirstShard, neighbour: list[int]) -> tuple[list[float], float]:
    """The gaps of a stream while `neighbour` was being prefilled, and the TTFT of that, in milliseconds."""
    clock = asyncio.get_running_loop().time
    arrivals: list[float] = []
    stream = asyncio.create_task(shard.generate(prompt(64), 2000, arrived=lambda: arrivals.append(clock())))
    while len(arrivals) < 8:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    begun = clock()
    answer = await shard.generate(neighbour, 1)
    ended = clock()
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    return _gaps_ms([at for at in arrivals if begun <= at <= ended]), answer.ttft_ms


def _gaps_ms(arrivals: list[float]) -> list[float]:
    return [(later - earlier) * 1e3 for earlier, later in pairwise(arrivals)]


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
