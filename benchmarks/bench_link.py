"""What does a slow link cost a token? One stream over links with a round trip of 0, 5 and 20 ms, in alternation."""

from __future__ import annotations

from statistics import median

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, write
from benchmarks.slow_link import slow_link

# Milliseconds there and back, bits a second.
LINKS = ((0, 1e9), (5, 1e9), (20, 1e9), (20, 1e8))
PROMPT_TOKENS = 512


async def measure(options: Options) -> None:
    """Time per token and TTFT of one stream; what a link adds is the difference to the one without a round trip."""
    rounds, decoded = (1, 4) if options.tiny else (7, 32)
    cluster = preset()
    top = next(shard.name for shard in cluster.shards if shard.role == "top")
    tokens: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    with running(cluster) as local:
        async with slow_link(local.address(top)) as link, first_shard(local, chain=[link.address]) as shard:
            for index in range(rounds + 1):
                for number, (round_trip_ms, rate) in enumerate(LINKS):
                    link.round_trip_seconds, link.bits_per_second = round_trip_ms / 1e3, rate
                    timed = await shard.generate(prompt(PROMPT_TOKENS, index * 10 + number), decoded)
                    if index:
                        name = f"{round_trip_ms} ms, {rate / 1e6:g} Mbit/s"
                        tokens.setdefault(f"{name}: ms a token", []).append(timed.token_ms)
                        firsts.setdefault(f"{name}: TTFT at {PROMPT_TOKENS}, ms", []).append(timed.ttft_ms)
    base = median(next(iter(tokens.values())))
    added = {f"{name} more than without": median(values) - base for name, values in tokens.items()}
    write(options, {**tokens, **firsts}, {}, added=added)
    for name, milliseconds in added.items():
        print(f"  {name:<60} {milliseconds:10.2f}")


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
