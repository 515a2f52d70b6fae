"""`router-gateway train`: labels to an artefact, with figures on rows unseen. Knows no gateway."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stitch.cli.arguments import named
from stitch_training.router_arguments import add_data, said

if TYPE_CHECKING:
    from stitch_training.labels import LabelledSet
    from stitch_training.recovery import Numbers
    from stitch_training.router_fit import Examples
    from stitch_training.router_report import Rankings

# What a fresh router is set to until it is calibrated: half of the way from cheapest to dearest.
FIRST_BUDGET = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`."""
    add_data(parser, "labelled prompts, JSON lines, plain or gzip; every file is a source with an expert of its own")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the artefact, a safetensors file")
    parser.add_argument(
        "--routes", metavar="NAME,…", default="weak,strong", help="cheapest first; default: %(default)s"
    )
    parser.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    return said(lambda: train(args.data, args.out, tuple(args.routes.split(",")), args.rename, args.folds))


def train(data: list[Path], out: Path, routes: tuple[str, ...], renamed: list[str], folds: int) -> None:
    """Writes the artefact of all rows and prints the figures of the cross-validation.

    Raises InvalidRequest where the data or a flag is off.
    """
    import numpy as np

    from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, save_router
    from stitch_training.calibration import calibrate, relative_costs
    from stitch_training.labels import read_labels
    from stitch_training.router_cross_validation import unseen_gains
    from stitch_training.router_fit import fit, gather

    check(routes, folds)
    sets = [read_labels(path, routes, named(renamed, "rename")) for path in data]
    examples = gather(sets)
    prompts = [prompt for labelled in sets for prompt in labelled.prompts]
    gains = unseen_gains(examples, prompts, folds, lambda done: _say(f"fold {done} of {folds}"))
    found = _figures(sets, examples, gains)
    model = fit(examples)
    artifact = RouterArtifact(
        model=model,
        thresholds=calibrate(gains, relative_costs(routes, None), FIRST_BUDGET).thresholds,
        gain_percentiles=tuple(np.quantile(gains[:, -1], np.linspace(0, 1, 101)).tolist()),
        training=_provenance(sets, found, folds),
        fingerprint=fingerprint_of(model),
    )
    save_router(artifact, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, fingerprint {artifact.fingerprint[:12]}")


def check(routes: tuple[str, ...], folds: int) -> None:
    """Raises InvalidRequest for what can't be trained."""
    from stitch.errors import InvalidRequest

    if len(set(routes)) < max(len(routes), 2) or not all(routes):
        raise InvalidRequest("routes", ",".join(routes), "there must be two or more, each named once")
    if folds < 2:
        raise InvalidRequest("folds", folds, "it must be at least 2")


def _figures(sets: list[LabelledSet], examples: Examples, gains: Numbers) -> dict[str, dict[str, Rankings]]:
    """By source and pair; printed as they are found."""
    from stitch_training.router_report import pairs, table

    found = {}
    for index, labelled in enumerate(sets):
        found[labelled.name] = pairs(
            labelled.routes, gains[examples.source == index], labelled.prompts, labelled.qualities
        )
        for pair, ranked in found[labelled.name].items():
            print(table(f"{labelled.name}, {pair}, {len(labelled):,} rows unseen:", ranked), end="\n\n")
    return found


def _provenance(sets: list[LabelledSet], found: dict[str, dict[str, Rankings]], folds: int) -> dict[str, Any]:
    figures = {
        source: {
            pair: {"apgr": one["router"].apgr.value, "cpt_50": one["router"].cpt_50.value} for pair, one in of.items()
        }
        for source, of in found.items()
    }
    data = [{"name": one.name, "rows": len(one), "skipped": one.skipped, "sha256": one.fingerprint} for one in sets]
    return {"data": data, "folds": folds, "unseen": figures}


def _say(line: str) -> None:
    print(line, file=sys.stderr)
