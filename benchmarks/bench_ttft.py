"""How does TTFT grow with the prompt's length, by route? Measured through the gateway, with a regression line each."""

from __future__ import annotations

import asyncio
from statistics import median

from benchmarks.clusters import preset, run, running
from benchmarks.report import Options, options, write
from stitch.cli.ttft import Sample, medians, plot, regression
from stitch.cli.ttft import measure as samples_of
from stitch.client import Client


async def measure(options: Options) -> None:
    """Alternates the routes at every length; the slope is the cost of one more prompt token."""
    lengths, repeat = ((16, 64), 1) if options.tiny else ((16, 64, 128, 256, 512, 1024), 5)
    cluster = preset()
    routes = [route.name for route in cluster.routes]
    with running(cluster) as local:
        sampled = await asyncio.to_thread(_samples, local.cluster.gateway.address, routes, lengths, repeat)
    slopes = {route: regression(medians(sampled, route)).slope_seconds for route in routes}
    samples = {
        f"{route}, {length} tokens, ms": [
            one.ttft_seconds * 1e3 for one in sampled if (one.route, one.length) == (route, length)
        ]
        for route in routes
        for length in lengths
    }
    costliest = routes[-1]
    ratios = {f"{route} / {costliest}, ms per prompt token": slopes[route] / slopes[costliest] for route in routes[:-1]}
    write(options, samples, ratios, slope_seconds=slopes, stages=_stages(sampled, max(lengths)))
    plot(sampled, routes, f"{cluster.name}: time to first token", options.out.with_suffix(".png"))


def _samples(gateway: str, routes: list[str], lengths: tuple[int, ...], repeat: int) -> list[Sample]:
    with Client(gateway) as client:
        return list(samples_of(client, routes, lengths, repeat))


def _stages(sampled: list[Sample], length: int) -> dict[str, dict[str, float]]:
    """By route, the median seconds of every stage at the longest prompts."""
    found: dict[str, dict[str, float]] = {}
    for route in dict.fromkeys(one.route for one in sampled):
        stages_of_route = [one.stages for one in sampled if (one.route, one.length) == (route, length)]
        found[route] = {stage: median(stages[stage] for stages in stages_of_route) for stage in stages_of_route[0]}
    return found


if __name__ == "__main__":
    run(measure(options(__doc__ or "")))
