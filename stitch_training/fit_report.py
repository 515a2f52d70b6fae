"""What a fit leaves for people: one JSON object and a picture of its losses. Computes no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """One object, indented, with a line break at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=1) + "\n")


def loss_lines(report: dict[str, Any]) -> list[str]:
    """The held-out losses of a report as lines of a table."""
    rows = report["losses"].items()
    return [f"{name:16s} {i['all']['mean']:.3f}  [{i['all']['low']:.3f}, {i['all']['high']:.3f}]" for name, i in rows]


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Held-out loss against tokens trained on, between the levels of whole models and least squares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    history, tokens = report["history"], report["training"]["batch_sequences"] * report["sequence_tokens"]
    if history:
        axes.plot(*_against_tokens(history["held_out"], tokens), marker="o", label="stitched, held out")
    for name, levels in report["losses"].items():
        if name != "stitched" or not history:
            axes.axhline(levels["all"]["mean"], linestyle="--", color="0.5")
            axes.annotate(name, (0.99, levels["all"]["mean"]), xycoords=("axes fraction", "data"), ha="right")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title(f"{report['cut']['bottom_layers']} → {report['cut']['top_from']}")
    if history:
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _against_tokens(points: list[tuple[int, float]], tokens: int) -> tuple[list[int], list[float]]:
    return [step * tokens for step, _ in points], [loss for _, loss in points]
