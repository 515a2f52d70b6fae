"""`stitch ttft`: measures, prints and draws. Doesn't know how a sample is taken."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from stitch.cli.connection import gateway
from stitch.cli.tables import lines_table, ttft_table
from stitch.cli.ttft_samples import Sample, fitting, measure, report
from stitch.client import Client


def run(parsed: argparse.Namespace) -> int:
    """Measures every route, and writes what was asked for."""
    console = Console()
    with Client(*gateway(parsed)) as client:
        found = client.describe()
        routes = [route.name for route in found.routes]
        context = min(found.bottom.context_length, found.top.context_length)
        samples = measured(console, client, routes, fitting(parsed.lengths, context), parsed.repeat)
    show_times(console, samples, routes)
    if parsed.json:
        written = {"cluster": found.cluster, **report(samples, routes)}
        Path(parsed.json).write_text(json.dumps(written, indent=2) + "\n")
    if parsed.out:
        draw(console, samples, routes, found.cluster, Path(parsed.out))
    return 0


def measured(
    console: Console, client: Client, routes: Sequence[str], lengths: Sequence[int], repeat: int
) -> list[Sample]:
    """All samples, with progress on a terminal."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        samples = measure(client, routes, lengths, repeat)
        return list(progress.track(samples, total=len(routes) * len(lengths) * repeat, description="measuring"))


def show_times(console: Console, samples: Sequence[Sample], routes: Sequence[str]) -> None:
    """The medians, and the regression lines."""
    for drawn in (ttft_table(samples, routes), lines_table(samples, routes)):
        console.print()
        console.print(drawn)


def draw(console: Console, samples: Sequence[Sample], routes: Sequence[str], cluster: str, file: Path) -> None:
    """Writes the PNG; says what is missing where there is no matplotlib."""
    try:
        from stitch.cli.ttft_plot import plot
    except ImportError as error:
        console.print(f"no plot: {error}; install stitch-serving[cli]", highlight=False, markup=False)
        return
    plot(samples, routes, f"{cluster}: time to first token", file)
    console.print(f"plot: {file}", highlight=False, markup=False)
