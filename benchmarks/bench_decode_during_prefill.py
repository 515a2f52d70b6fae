"""How much does the prefill of a long prompt slow down decode? Inter-token latency of one stream, with and without."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from statistics import quantiles

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, write


async def measure(options: Options) -> None:
    """Samples the inter-token latency of one stream, idle and during the prefill of another session."""
    rounds, length = (1, 300) if options.tiny else (5, 2000)
    idle: list[float] = []
    during: list[float] = []
    prefills: list[float] = []
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                alone = await shard.generate(prompt(64), 64)
                gaps, ttft_ms = await _during_prefill(shard, prompt(length, index + 1))
                if index:
                    idle += _gaps_ms(alone.arrivals)
                    during += gaps
                    prefills.append(ttft_ms)
    samples = {"idle, ms per token": idle, f"during a prefill of {length} tokens, ms per token": during}
    ratios = {"p95 during prefill / p95 idle": _p95(during) / _p95(idle)}
    write(options, {**samples, f"TTFT of the {length} tokens, ms": prefills}, ratios)


async def _during_prefill(shard: FirstShard, long_prompt: list[int]) -> tuple[list[float], float]:
    """The inter-token latencies of a stream during the prefill of `long_prompt`, and the TTFT of that, in ms."""
    clock = asyncio.get_running_loop().time
    arrivals: list[float] = []
    stream = asyncio.create_task(shard.generate(prompt(64), 2000, arrived=lambda: arrivals.append(clock())))
    while len(arrivals) < 8:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    started = clock()
    answer = await shard.generate(long_prompt, 1)
    ended = clock()
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    return _gaps_ms([at for at in arrivals if started <= at <= ended]), answer.ttft_ms


def _gaps_ms(arrivals: list[float]) -> list[float]:
    return [(later - earlier) * 1e3 for earlier, later in pairwise(arrivals)]


def _p95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
