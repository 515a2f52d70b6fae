"""How long until the first token, by the prompt's length and by route? Through the gateway, with a line for each."""

from __future__ import annotations

import asyncio
from statistics import median

from benchmarks.clusters import preset, run, running
from benchmarks.report import Options, options, write
from stitch.cli.ttft import Sample, medians, plot, regression
from stitch.cli.ttft import measure as samples_of
from stitch.client import Client


async def measure(options: Options) -> None:
    """Routes take turns at every length. The slope is what one more prompt token costs."""
    lengths, repeat = ((16, 64), 1) if options.tiny else ((16, 64, 128, 256, 512, 1024), 5)
    cluster = preset()
    routes = [route.name for route in cluster.routes]
    with running(cluster) as local:
        taken = await asyncio.to_thread(_samples, local.cluster.gateway.address, routes, lengths, repeat)
    slopes = {route: regression(medians(taken, route)).slope_seconds for route in routes}
    samples = {
        f"{route}, {length} tokens, ms": [
            one.ttft_seconds * 1e3 for one in taken if (one.route, one.length) == (route, length)
        ]
        for route in routes
        for length in lengths
    }
    dearest = routes[-1]
    ratios = {f"{route} / {dearest}, ms a prompt token": slopes[route] / slopes[dearest] for route in routes[:-1]}
    write(options, samples, ratios, slope_seconds=slopes, stages=_stages(taken, max(lengths)))
    plot(taken, routes, f"{cluster.name}: time to first token", options.out.with_suffix(".png"))


def _samples(gateway: str, routes: list[str], lengths: tuple[int, ...], repeat: int) -> list[Sample]:
    with Client(gateway) as client:
        return list(samples_of(client, routes, lengths, repeat))


def _stages(taken: list[Sample], length: int) -> dict[str, dict[str, float]]:
    """By route, where the time of the longest prompts went: medians in seconds."""
    found: dict[str, dict[str, float]] = {}
    for route in dict.fromkeys(one.route for one in taken):
        mine = [one.stages for one in taken if (one.route, one.length) == (route, length)]
        found[route] = {stage: median(stages[stage] for stages in mine) for stage in mine[0]}
    return found


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
