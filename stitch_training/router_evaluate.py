"""`router-gateway evaluate`: what an artefact is worth on labelled prompts. Knows no training."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stitch.cli.arguments import named
from stitch_training.router_arguments import add_data, said

if TYPE_CHECKING:
    from router_gateway.routing.learned.artifact import RouterArtifact
    from stitch_training.labels import LabelledSet
    from stitch_training.router_report import Rankings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    parser.add_argument("--router", metavar="FILE", type=Path, required=True, help="the artefact")
    add_data(parser, "labelled prompts that the training has not seen")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the curves; with several data files, one each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures")


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    return said(lambda: evaluate(args.router, args.data, args.rename, args.plot, args.json))


def evaluate(router: Path, data: list[Path], renamed: list[str], plot: Path | None, out: Path | None) -> None:
    """Prints figures for every file, and draws and writes them where asked.

    Raises InvalidRequest where the artefact or the data is off.
    """
    from router_gateway.routing.learned.artifact import load_router
    from stitch_training.labels import read_labels
    from stitch_training.router_report import as_json

    artifact = load_router(router)
    report: dict[str, Any] = {"router": artifact.fingerprint, "data": {}}
    for path in data:
        labelled = read_labels(path, artifact.model.routes, named(renamed, "rename"))
        found, rungs = _measured(artifact, labelled)
        report["data"][labelled.name] = {
            "sha256": labelled.fingerprint,
            "rows": len(labelled),
            "seen_in_training": _was_seen(artifact, labelled),
            "pairs": as_json(found),
            "at_thresholds": rungs,
        }
        _draw(found, plot, labelled.name if len(data) > 1 else None)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def _measured(artifact: RouterArtifact, labelled: LabelledSet) -> tuple[dict[str, Rankings], dict[str, Any]]:
    """The rankings of every pair, and what the artefact's own thresholds make of the prompts; both printed."""
    import numpy as np

    from stitch.thresholds import choose_routes
    from stitch_training.router_report import curve_table, pairs, table

    if _was_seen(artifact, labelled):
        print(f"{labelled.name}: the router was trained on this very file, so its figures flatter it", file=sys.stderr)
    gains = np.array([artifact.model.gains(prompt) for prompt in labelled.prompts], np.float64)
    found = pairs(labelled.routes, gains, labelled.prompts, labelled.qualities)
    for pair, ranked in found.items():
        print(table(f"{labelled.name}, {pair}, {len(labelled):,} rows:", ranked))
        print(curve_table(ranked["router"]), end="\n\n")
    taken = choose_routes(gains, np.array(artifact.thresholds))
    shares = np.bincount(taken, minlength=len(labelled.routes)) / len(labelled)
    by_route = dict(zip(labelled.routes, shares.tolist(), strict=True))
    quality = float(labelled.qualities[np.arange(len(taken)), taken].mean())
    shown = ", ".join(f"{route} {share:.0%}" for route, share in by_route.items())
    print(f"at the artefact's own thresholds: {shown}; mean quality {quality:.3f}", end="\n\n")
    return found, {"shares": by_route, "quality": quality}


def _was_seen(artifact: RouterArtifact, labelled: LabelledSet) -> bool:
    return any(seen.get("sha256") == labelled.fingerprint for seen in artifact.training.get("data", []))


def _draw(found: dict[str, Rankings], plot: Path | None, name: str | None) -> None:
    from stitch_training.router_report import draw

    if plot is not None:
        draw(found, plot if name is None else plot.with_stem(f"{plot.stem}-{name}"))
