"""What does growth cost? Time per token over sessions, context and the mixture of routes, in alternation."""

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
    """Medians over a crowd of the time per token of each, all of them decoding together."""
    rounds, decoded = (1, 4) if options.tiny else (5, 32)
    crowds: dict[str, tuple[int, int, tuple[str, ...]]] = {}
    crowds |= {f"{count} at 64 tokens": (count, 64, ("strong",)) for count in SESSIONS}
    crowds |= {f"1 at {context} tokens": (1, context, ("strong",)) for context in CONTEXTS}
    crowds |= {
        f"{MIXED_SESSIONS} at 64 tokens, {name}": (MIXED_SESSIONS, 64, routes) for name, routes in MIXTURES.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in crowds}
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                for name, crowd in crowds.items():
                    token_ms = await _token_ms(shard, *crowd, decoded)
                    if index:
                        samples[name].append(token_ms)
    base = samples["1 at 64 tokens"]
    write(options, samples, {name: ratio(values, base) for name, values in samples.items()})


async def _token_ms(shard: FirstShard, sessions: int, context: int, routes: tuple[str, ...], decoded: int) -> float:
    """Prompts repeat from round to round, so that their KV is reused and decode is what is timed."""
    crowd = (
        shard.generate(prompt(context, number), decoded, routes[number % len(routes)]) for number in range(sessions)
    )
    return median(one.token_ms for one in await asyncio.gather(*crowd))


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
