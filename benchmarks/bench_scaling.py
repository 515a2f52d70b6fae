"""How does time per token scale? Over sessions, context length and the mixture of routes, in alternation."""

from __future__ import annotations

import asyncio
from statistics import median

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write

SESSIONS = (1, 4, 16, 64)
CONTEXTS = (512, 2048)
MIXTURES = {"all strong": ("strong",), "half weak": ("strong", "weak"), "all weak": ("weak",)}
MIXED_SESSIONS = 8


async def measure(options: Options) -> None:
    """Samples the median time per token of sessions that all decode together."""
    rounds, decoded = (1, 4) if options.tiny else (5, 32)
    workloads: dict[str, tuple[int, int, tuple[str, ...]]] = {}
    workloads |= {f"{count} at 64 tokens": (count, 64, ("strong",)) for count in SESSIONS}
    workloads |= {f"1 at {context} tokens": (1, context, ("strong",)) for context in CONTEXTS}
    workloads |= {
        f"{MIXED_SESSIONS} at 64 tokens, {name}": (MIXED_SESSIONS, 64, routes) for name, routes in MIXTURES.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in workloads}
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                for name, workload in workloads.items():
                    token_ms = await _token_ms(shard, *workload, decoded)
                    if index:
                        samples[name].append(token_ms)
    base = samples["1 at 64 tokens"]
    write(options, samples, {name: ratio(values, base) for name, values in samples.items()})


async def _token_ms(shard: FirstShard, sessions: int, context: int, routes: tuple[str, ...], decoded: int) -> float:
    """The median time per token. Prompts repeat every round, so that their KV is reused and only decode is timed."""
    answers = (
        shard.generate(prompt(context, number), decoded, routes[number % len(routes)]) for number in range(sessions)
    )
    return median(one.token_ms for one in await asyncio.gather(*answers))


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
