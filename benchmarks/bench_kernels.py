"""What do compiled kernels give? Two shards with and without them, in alternation."""

from __future__ import annotations

from benchmarks.clusters import first_shard, preset, prompt, run, running
from benchmarks.report import Options, options, ratio, write

DTYPES = ("float32", "bfloat16")


async def measure(options: Options) -> None:
    """Time per token of one stream, in both dtypes."""
    samples: dict[str, list[float]] = {}
    ratios = {}
    for dtype in DTYPES:
        without, compiled = await _token_ms(dtype, *((1, 8) if options.tiny else (8, 96)))
        samples |= {f"{dtype}, libraries, ms a token": without, f"{dtype}, kernels, ms a token": compiled}
        ratios[f"{dtype}, kernels / libraries"] = ratio(compiled, without)
    write(options, samples, ratios)


async def _token_ms(dtype: str, rounds: int, decoded: int) -> tuple[list[float], list[float]]:
    """Without and with kernels, round by round."""
    without, compiled = (preset(dtype=dtype, kernels=kernels) for kernels in (False, True))
    samples: tuple[list[float], list[float]] = [], []
    with running(without) as first, running(compiled) as second:
        async with first_shard(first) as one, first_shard(second) as other:
            for index in range(rounds + 1):
                for shard, values in zip((one, other), samples, strict=True):
                    timed = await shard.generate(prompt(64, index), decoded)
                    # In the first round, shards try how many threads are best.
                    values.extend([timed.token_ms] if index else [])
    return samples


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
