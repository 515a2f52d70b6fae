"""A router's figures beside those of no router at all. Knows no model.

The baselines stand in every report: a random share, the prompt's length, and the oracle, which knows every gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stitch_training.labels import Qualities
from stitch_training.recovery import STEPS, Figure, Numbers, Recovery, recovery

Rankings = Mapping[str, Recovery]

_HEADINGS = ("router", "APGR", "CPT(50 %)", "CPT(80 %)")


def rankings(gain: Numbers, prompts: Sequence[str], weak: Numbers, strong: Numbers) -> Rankings:
    """The recovery of a router's gains [prompts] and of every baseline, by name."""
    length = np.array([len(prompt) for prompt in prompts], np.float64)
    return {
        "router": recovery(gain, weak, strong),
        "prompt length": recovery(length, weak, strong),
        "random": _random(),
        "oracle": recovery(strong - weak, weak, strong),
    }


def pairs(routes: Sequence[str], gains: Numbers, prompts: Sequence[str], qualities: Qualities) -> dict[str, Rankings]:
    """Every dearer route against the cheapest one, by `cheapest → dearer`; gains and qualities [prompts, routes]."""
    return {
        f"{routes[0]} → {route}": rankings(gains[:, rung], prompts, qualities[:, 0], qualities[:, rung])
        for rung, route in enumerate(routes[1:], start=1)
    }


def table(title: str, found: Rankings) -> str:
    """Lines for a person: a figure and its 95 % interval in each cell."""
    rows = [
        (name, _shown(one.apgr, 1), _shown(one.cpt_50, 100), _shown(one.cpt_80, 100)) for name, one in found.items()
    ]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (_HEADINGS, *rows)
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def curve_table(found: Recovery) -> str:
    """The router's own curve as two lines."""
    shares = "  ".join(f"{share:4.0%}" for share in found.shares)
    return f"share of strong  {shares}\nPGR              " + "  ".join(f"{pgr:4.0%}" for pgr in found.pgr)


def as_json(found: Mapping[str, Rankings]) -> dict[str, Any]:
    """Everything of a report, for a program."""
    return {pair: {name: asdict(one) for name, one in ranked.items()} for pair, ranked in found.items()}


def draw(found: Mapping[str, Rankings], path: Path) -> None:
    """A picture of all curves, one panel for each pair; the file's name says the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.5 * len(found), 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    for panel, (pair, ranked) in zip(canvas.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, one in ranked.items():
            style = "-" if name == "router" else "--"
            panel.plot(one.shares, one.pgr, style, label=f"{name}: APGR {one.apgr.value:.3f}")
        panel.set(title=pair, xlabel="share of the dearer route", ylabel="recovered part of its lead (PGR)")
        panel.legend(loc="lower right")
    canvas.savefig(path, dpi=150)


def _random() -> Recovery:
    """What a coin gives on average, exactly."""
    steps = tuple((np.arange(STEPS + 1) / STEPS).tolist())
    return Recovery(steps, steps, Figure(0.5, 0.5, 0.5), Figure(0.5, 0.5, 0.5), Figure(0.8, 0.8, 0.8))


def _shown(figure: Figure, factor: float) -> str:
    digits = 3 if factor == 1 else 1
    value, low, high = (f"{factor * part:.{digits}f}" for part in (figure.value, figure.low, figure.high))
    return value if low == high else f"{value} [{low}, {high}]"
