"""Reports for people and programs: JSON files, tables and plots of a fit's losses and of a router's figures.

A router's figures always come with three baselines: a random share, the prompt's length, and the oracle, which knows
every gain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stitch_training.data import CONTENT_SLICE
from stitch_training.labels import LabelledSet
from stitch_training.recovery import STEPS, Estimate, Float64Array, Recovery, apgr_lead, recovery

_HEADINGS = ("router", "APGR", "PGR at 50 %", "CPT(50 %)", "CPT(80 %)")
# The rankings of all sources together, beside those of each.
ALL_FILES = "all files"


class Rankings(dict[str, Recovery]):
    """The recovery of a router and of every baseline by name, and the router's lead over prompt length."""

    def __init__(self, found: Mapping[str, Recovery], lead: Estimate) -> None:
        super().__init__(found)
        # Of the APGR, over the same prompts.
        self.lead = lead


# Rankings by source of labels and pair of routes.
SourceRankings = Mapping[str, Mapping[str, Rankings]]


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes one indented object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=1) + "\n")


def loss_lines(report: dict[str, Any]) -> list[str]:
    """Returns the held-out losses on content of a fit's report as lines of a table."""
    rows = report["losses"].items()
    return [
        f"{name:16s} {one['mean']:.3f}  [{one['low']:.3f}, {one['high']:.3f}]"
        for name, one in ((name, slices[CONTENT_SLICE]) for name, slices in rows)
    ]


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Draws held-out loss against tokens trained on, with the whole models and the closed form as levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    history, step_tokens = report["history"], report["training"]["batch_sequences"] * report["sequence_tokens"]
    if history:
        steps, losses = zip(*history["held_out"], strict=True)
        axes.plot([step * step_tokens for step in steps], losses, marker="o", label="stitched, held out")
    for name, levels in report["losses"].items():
        if name != "stitched" or not history:
            axes.axhline(levels[CONTENT_SLICE]["mean"], linestyle="--", color="0.5")
            at = (0.99, levels[CONTENT_SLICE]["mean"])
            axes.annotate(name, at, xycoords=("axes fraction", "data"), ha="right")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("nats per token: loss in training, cross-entropy on content (dashed)")
    axes.set_title(f"{report['cut']['bottom_layers']} → {report['cut']['top_from']}")
    if history:
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def rank(gain: Float64Array, prompts: Sequence[str], weak: Float64Array, strong: Float64Array) -> Rankings:
    """Returns the recovery of a router's gains [prompts] and of every baseline, by name."""
    length = np.array([len(prompt) for prompt in prompts], np.float64)
    found = {
        "router": recovery(gain, weak, strong),
        "prompt length": recovery(length, weak, strong),
        "random": _random(),
        "oracle": recovery(strong - weak, weak, strong),
    }
    return Rankings(found, apgr_lead(gain, length, weak, strong))


def rank_pairs(
    routes: Sequence[str], gains: Float64Array, prompts: Sequence[str], qualities: Float64Array
) -> dict[str, Rankings]:
    """Compares every costlier route with the cheapest, by `cheapest → costlier`; arrays are [prompts, routes]."""
    return {
        f"{routes[0]} → {route}": rank(gains[:, index], prompts, qualities[:, 0], qualities[:, index])
        for index, route in enumerate(routes[1:], start=1)
    }


def rank_sources(sets: Sequence[LabelledSet], gains: Float64Array) -> dict[str, dict[str, Rankings]]:
    """Compares the pairs of routes of every set, and of several sets also of all their rows as one ranking.

    `gains` [rows, routes] are of all sets, one after the other.
    """
    starts = np.cumsum([0, *map(len, sets)])
    found = {
        one.name: rank_pairs(one.routes, gains[start : start + len(one)], one.prompts, one.qualities)
        for one, start in zip(sets, starts[:-1], strict=True)
    }
    if len(sets) > 1:
        prompts, qualities = [prompt for one in sets for prompt in one.prompts], [one.qualities for one in sets]
        found[ALL_FILES] = rank_pairs(sets[0].routes, gains, prompts, np.concatenate(qualities))
    return found


def training_record(sets: Sequence[LabelledSet], found: SourceRankings) -> dict[str, Any]:
    """Returns the record of data and cross-validated figures that an artifact keeps."""
    figures = {
        source: {
            pair: {name: getattr(one["router"], name).value for name in ("apgr", "pgr_50", "cpt_50")}
            for pair, one in rankings.items()
        }
        for source, rankings in found.items()
    }
    data = [{"name": one.name, "rows": len(one), "skipped": one.skipped, "sha256": one.fingerprint} for one in sets]
    return {"data": data, "unseen": figures}


def table(title: str, found: Rankings) -> str:
    """Returns a table with a figure and its 95 % interval in each cell."""
    rows = [
        (name, _format(one.apgr, 1), _format(one.pgr_50, 1), _format(one.cpt_50, 100), _format(one.cpt_80, 100))
        for name, one in found.items()
    ]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (_HEADINGS, *rows)
    ]
    lead = f"APGR of the router minus that of prompt length: {_format(found.lead, 1)}"
    return "\n".join([title, *(line.rstrip() for line in lines), lead])


def draw_lines(draws: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns each ranking's mean APGR and PGR at 50 % over draws of the folds, with the range of the draws.

    `draws` are the `unseen` of their `training_record`.
    """
    lines = [f"the router, means over {len(draws)} draws of the folds:"]
    for source, pairs in draws[0].items():
        for pair in pairs:
            apgr, pgr = ([draw[source][pair][name] for draw in draws] for name in ("apgr", "pgr_50"))
            lines.append(f"{source}, {pair}: APGR {_with_range(apgr)}, PGR at 50 % {_with_range(pgr)}")
    return lines


def _with_range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def curve_table(found: Recovery) -> str:
    """Returns the router's own curve as two lines."""
    shares = "  ".join(f"{share:4.0%}" for share in found.shares)
    return f"share of strong  {shares}\nPGR              " + "  ".join(f"{pgr:4.0%}" for pgr in found.pgr)


def as_json(found: Mapping[str, Rankings]) -> dict[str, Any]:
    """Returns all figures and curves by pair and ranking, and the router's `lead` over prompt length."""
    return {
        pair: {**{name: asdict(one) for name, one in rankings.items()}, "lead": asdict(rankings.lead)}
        for pair, rankings in found.items()
    }


def plot_curves(found: Mapping[str, Rankings], path: Path) -> None:
    """Draws all curves, one panel for each pair; the file's suffix decides the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (pair, rankings) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, one in rankings.items():
            style = "-" if name == "router" else "--"
            panel.plot(one.shares, one.pgr, style, label=f"{name}: APGR {one.apgr.value:.3f}")
        panel.set(title=pair, xlabel="share of the costlier route", ylabel="recovered part of its lead (PGR)")
        panel.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _random() -> Recovery:
    """Returns the exact expectation of a random ranking."""
    steps = tuple((np.arange(STEPS + 1) / STEPS).tolist())
    half = Estimate(0.5, 0.5, 0.5)
    return Recovery(steps, steps, half, half, half, Estimate(0.8, 0.8, 0.8))


def _format(estimate: Estimate, factor: float) -> str:
    digits = 3 if factor == 1 else 1
    value, low, high = (f"{factor * part:.{digits}f}" for part in (estimate.value, estimate.low, estimate.high))
    return value if low == high else f"{value} [{low}, {high}]"
