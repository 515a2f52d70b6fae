"""What does each route cost beside the others? One stream on every route, by weights of every kind, in alternation."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from typing import NamedTuple

from benchmarks.clusters import FirstShard, first_shard, preset, prompt, run, running
from benchmarks.report import Options, flags, ratio, write
from stitch.cluster import Quantization

KINDS: tuple[Quantization, ...] = ("none", "int8", "int4")
PROMPT_TOKENS = 128
TOKEN, TTFT = "ms per token", "TTFT in ms"


class Measured(NamedTuple):
    """A route with weights of one kind."""

    route: str
    kind: Quantization

    def __str__(self) -> str:
        return self.route if self.kind == "none" else f"{self.route}, {self.kind}"


async def measure(options: Options, cluster: str) -> None:
    """Samples the time per token and the TTFT on all routes of a preset or cluster file; the first round warms up."""
    rounds, decoded = (1, 8) if options.tiny else (12, 32)
    clusters = {kind: preset(cluster, quantization=kind) for kind in KINDS}
    routes = [route.name for route in clusters["none"].routes]
    samples: dict[str, list[float]] = {}
    with ExitStack() as processes:
        started = {kind: processes.enter_context(running(one)) for kind, one in clusters.items()}
        async with AsyncExitStack() as links:
            shards = {
                Measured(route, kind): await links.enter_async_context(first_shard(local, route))
                for route in routes
                for kind, local in started.items()
            }
            await _sample_all(shards, rounds, decoded, samples)
    costliest = routes[-1]
    ratios = {
        f"{measured} / {costliest}, {name}": ratio(samples[f"{measured}, {name}"], samples[f"{costliest}, {name}"])
        for name in (TOKEN, TTFT)
        for measured in shards
        if str(measured) != costliest
    }
    write(options, samples, ratios, cluster=cluster)


async def _sample_all(
    shards: dict[Measured, FirstShard], rounds: int, decoded: int, samples: dict[str, list[float]]
) -> None:
    for index in range(rounds + 1):
        for number, (measured, shard) in enumerate(shards.items()):
            found = await _sample(shard, measured.route, index * len(shards) + number, decoded)
            for name, milliseconds in found.items() if index else ():
                samples.setdefault(f"{measured}, {name}", []).append(milliseconds)


async def _sample(shard: FirstShard, route: str, seed: int, decoded: int) -> dict[str, float]:
    # No two prompts are the same, so that none finds its prefix in a cache.
    timed = await shard.generate(prompt(PROMPT_TOKENS, seed), 1 + decoded, route)
    return {TOKEN: timed.token_ms, TTFT: timed.ttft_ms}


def _options() -> tuple[Options, str]:
    parser = flags(__doc__ or "")
    parser.add_argument("--cluster", metavar="CLUSTER", default="smollm2", help="a preset or cluster file")
    parsed = parser.parse_args()
    return Options(parsed.tiny, parsed.out), parsed.cluster


if __name__ == "__main__":
    run(measure(*_options()))
