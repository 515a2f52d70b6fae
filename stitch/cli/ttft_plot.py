"""Draws times to the first token over prompt lengths. Knows no gateway."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stitch.cli.output import line_text
from stitch.cli.ttft_samples import Sample, medians, regression


def plot(samples: Sequence[Sample], routes: Sequence[str], title: str, file: Path) -> None:
    """Writes a PNG: every sample, the medians, and each route's regression line."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, route in enumerate(routes):
        _draw_route(axes, [sample for sample in samples if sample.route == route], f"C{index}")
    axes.set(xlabel="prompt tokens", ylabel="seconds to the first token", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_route(axes: Axes, samples: Sequence[Sample], color: str) -> None:
    route = samples[0].route
    points = medians(samples, route)
    line = regression(points)
    ends = (0.0, max(tokens for tokens, _ in points))
    axes.scatter([one.prompt_tokens for one in samples], [one.ttft_seconds for one in samples], 16, color, alpha=0.3)
    axes.scatter([tokens for tokens, _ in points], [time for _, time in points], 36, color)
    axes.plot(ends, [line.at(tokens) for tokens in ends], color=color, label=f"{route}: {line_text(line)}")
