"""How much does the prefix cache save? Sessions that share a 400-token prefix against sessions that share none."""

from __future__ import annotations

import asyncio
from statistics import median

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write

SHARED_TOKENS = 400
OWN_TOKENS = 24


async def measure(options: Options) -> None:
    """Samples the median TTFT of sessions that all arrive at once."""
    rounds, sessions = (1, 4) if options.tiny else (3, 32)
    samples: dict[str, list[float]] = {}
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                seed = 1000 * index
                distinct = [prompt(SHARED_TOKENS + OWN_TOKENS, seed + number) for number in range(sessions)]
                prefix = prompt(SHARED_TOKENS, seed + 500)
                shared = [prefix + prompt(OWN_TOKENS, seed + 600 + number) for number in range(sessions)]
                for name, prompts in (("distinct", distinct), ("shared", shared)):
                    ttft_ms = await _median_ttft_ms(shard, prompts)
                    if index:
                        samples.setdefault(f"TTFT, {name} prefixes, ms", []).append(ttft_ms)
    distinct_ms, shared_ms = samples.values()
    write(options, samples, {"TTFT, shared / distinct prefixes": ratio(shared_ms, distinct_ms)})


async def _median_ttft_ms(shard: FirstShard, prompts: list[list[int]]) -> float:
    answers = await asyncio.gather(*(shard.generate(one, 1) for one in prompts))
    return median(answer.ttft_ms for answer in answers)


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
