"""How much does overlapping two shards speed up a long prefill? One core per shard against one process on one core."""

from __future__ import annotations

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.one_process import OneProcess
from benchmarks.report import Options, options, ratio, write


async def measure(options: Options) -> None:
    """Samples the TTFT of prompts without cached KV; the bottom computes chunk n + 1 while the top computes chunk n."""
    rounds, tokens = (1, 256) if options.tiny else (7, 1024)
    cluster = preset(threads=1, threads_while_pipelined=1)
    whole = OneProcess(cluster, threads=1)
    samples: dict[str, list[float]] = {}
    with running(cluster) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                one, two = whole.generate(prompt(tokens, index), 1), await shard.generate(prompt(tokens, index), 1)
                if index:
                    samples.setdefault(f"TTFT at {tokens}, one process on one core, ms", []).append(one.ttft_ms)
                    samples.setdefault(f"TTFT at {tokens}, two shards on one core each, ms", []).append(two.ttft_ms)
    one_ms, two_ms = samples.values()
    write(options, samples, {f"TTFT at {tokens}": ratio(two_ms, one_ms)})


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
