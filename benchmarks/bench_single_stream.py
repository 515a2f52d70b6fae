"""How fast does one stream decode? Two shards against `generate` and vLLM, prefill excluded."""

from __future__ import annotations

from statistics import median

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.engines import Engine, engines
from benchmarks.report import Options, options, write
from stitch.environment import cache_folder
from stitch_server.sources.resolve import resolve

PROMPT_TOKENS = 128
OURS = "two shards, ms per token"


async def measure(options: Options) -> None:
    """Samples the time per token; that of other engines is the time beyond the first token."""
    rounds, decoded = (1, 8) if options.tiny else (7, 64)
    cluster = preset()
    samples: dict[str, list[float]] = {OURS: []}
    with running(cluster) as local, engines(resolve(cluster.models.bottom.source, cache_folder())) as others:
        async with first_shard(local) as shard:
            # The first rounds warm up.
            for index in range(-2, rounds):
                token_ids = prompt(PROMPT_TOKENS, index)
                found = {
                    f"{name}, ms per token": _token_ms(engine, token_ids, decoded) for name, engine in others.items()
                }
                found[OURS] = (await shard.generate(token_ids, 1 + decoded)).token_ms
                for name, value in found.items() if index >= 0 else ():
                    samples.setdefault(name, []).append(value)
    ours = median(samples[OURS])
    ratios = {f"{name.split(',')[0]} / two shards": median(values) / ours for name, values in samples.items()}
    del ratios["two shards / two shards"]
    write(options, samples, ratios)


def _token_ms(engine: Engine, token_ids: list[int], decoded: int) -> float:
    first = engine.seconds([token_ids], 1)
    return (engine.seconds([token_ids], 1 + decoded) - first) / decoded * 1e3


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
