"""How many tokens per second at 1 to 64 sessions? Two shards against `generate` and vLLM, in alternation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.engines import Engine, engines
from benchmarks.report import Options, options, write
from stitch.environment import cache_folder
from stitch_server.sources.resolve import resolve

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 33
# Warm-up rounds, in which shards tune their threads and micro-batches.
WARM_UP = 2
OURS = "two shards"


async def measure(options: Options) -> None:
    """Samples output tokens per second from the first request to the last token, prefill included."""
    rounds, concurrencies = (1, (1, 2)) if options.tiny else (5, (1, 4, 16, 64))
    cluster = preset()
    samples: dict[str, list[float]] = {}
    ratios = {}
    with running(cluster) as local, engines(resolve(cluster.models.bottom.source, cache_folder())) as others:
        async with first_shard(local) as shard:
            for sessions in concurrencies:
                rates: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
                for index in range(-WARM_UP, rounds):
                    prompts = [prompt(PROMPT_TOKENS, index * 100 + number) for number in range(sessions)]
                    round_rates = await _round(shard, others, prompts)
                    for name, rate in round_rates.items() if index >= 0 else ():
                        rates[name].append(rate)
                for name, values in rates.items():
                    samples[f"{name}, {sessions} sessions, tokens/s"] = values
                for name in others:
                    ratios[f"{sessions} sessions, {OURS} / {name}"] = median(rates[OURS]) / median(rates[name])
    write(options, samples, ratios)


async def _round(shard: FirstShard, others: dict[str, Engine], prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Tokens per second by the engine's name; engines run one after the other."""
    produced = len(prompts) * OUTPUT_TOKENS
    rates = {name: produced / engine.seconds(prompts, OUTPUT_TOKENS) for name, engine in others.items()}
    started = time.perf_counter()
    await asyncio.gather(*(shard.generate(one, OUTPUT_TOKENS) for one in prompts))
    return rates | {OURS: produced / (time.perf_counter() - started)}


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
