"""What does the hop cost? One stream over two shards against the same pair in one process, in alternation."""

from __future__ import annotations

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.one_process import OneProcess
from benchmarks.report import Options, options, ratio, write


async def measure(options: Options) -> None:
    """Decode of one stream behind 64 prompt tokens, and TTFT at 512."""
    rounds, decoded = (2, 8) if options.tiny else (12, 48)
    cluster = preset()
    whole = OneProcess(cluster)
    samples: dict[str, list[float]] = {}
    with running(cluster) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                one, two = whole.generate(prompt(64), decoded), await shard.generate(prompt(64, index), decoded)
                long_one, long_two = whole.generate(prompt(512), 1), await shard.generate(prompt(512, index), 1)
                # The first round warms up.
                if index:
                    samples.setdefault("decode, one process, ms a token", []).append(one.token_ms)
                    samples.setdefault("decode, two shards, ms a token", []).append(two.token_ms)
                    samples.setdefault("TTFT at 512, one process, ms", []).append(long_one.ttft_ms)
                    samples.setdefault("TTFT at 512, two shards, ms", []).append(long_two.ttft_ms)
    one_token, two_token, one_first, two_first = samples.values()
    write(options, samples, {"decode": ratio(two_token, one_token), "TTFT at 512": ratio(two_first, one_first)})


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
