"""How close is decode to the memory bandwidth? Time per token against the time of reading its weights."""

from __future__ import annotations

import time

import torch

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write
from stitch.environment import cache_folder
from stitch_server.model.description import ParameterCount
from stitch_server.sources.resolve import resolve

FLOAT32_BYTES = 4


async def measure(options: Options) -> None:
    """Alternates one stream over two shards with a sum over as many bytes as a token's weights have."""
    rounds, decoded = (2, 8) if options.tiny else (12, 48)
    cluster = preset()
    count = ParameterCount.read(resolve(cluster.models.bottom.source, cache_folder()))
    weight_bytes = FLOAT32_BYTES * (count.between(0, len(count.layers)) + count.head)
    memory = torch.ones(weight_bytes // FLOAT32_BYTES)
    tokens: list[float] = []
    reads: list[float] = []
    with running(cluster) as local:
        async with first_shard(local) as shard:
            for index in range(rounds + 1):
                timed = await shard.generate(prompt(64, index), decoded)
                read_ms = _read_ms(memory)
                if index:
                    tokens.append(timed.token_ms)
                    reads.append(read_ms)
    samples = {"two shards, ms per token": tokens, f"reading {weight_bytes / 1e6:.0f} MB, ms": reads}
    write(options, samples, {"token / read": ratio(tokens, reads)}, weight_bytes=weight_bytes)


def _read_ms(memory: torch.Tensor) -> float:
    """Milliseconds of the sum on all cores: the best of three, since the lower bound is wanted."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.sum(memory)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
