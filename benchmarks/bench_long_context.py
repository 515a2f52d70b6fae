"""Does time per token grow with the context? One stream at positions 50 and 1,000, in alternation."""

from __future__ import annotations

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write

POSITIONS = (50, 1000)


async def measure(options: Options) -> None:
    """Samples decode after both prompts, which repeat, so that their KV is reused and only decode is timed."""
    rounds, decoded = (2, 8) if options.tiny else (12, 32)
    samples: dict[str, list[float]] = {}
    with running(preset()) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                for position in POSITIONS:
                    timed = await shard.generate(prompt(position), decoded)
                    if index:
                        samples.setdefault(f"position {position}, ms per token", []).append(timed.token_ms)
    early, late = samples.values()
    write(options, samples, {"position 1,000 / position 50": ratio(late, early)})


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
