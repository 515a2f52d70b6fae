"""The verb `stitch-server probe`: labels in, a probe with its report out. Knows no method."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stitch_training.fit_arguments import add_cluster, use_threads

if TYPE_CHECKING:
    from stitch_training.probe import Taught

PURPOSE = "teach the probe that decides routes inside of the first shard"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_cluster(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        type=Path,
        required=True,
        help="labelled prompts as `router-gateway train` takes them: JSON lines, plain or gzip",
    )
    parser.add_argument(
        "--rename", metavar="NAME=ROUTE", nargs="*", default=[], help="a name in the files stands for this route"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--tokens", metavar="N", type=int, default=128, help="of a prompt that it reads; default: 128")
    parser.add_argument("--chat", action="store_true", help="prompts are conversations of one turn, not plain text")
    parser.add_argument(
        "--budget", metavar="B", type=float, default=0.5, help="mean cost, 0 (all cheapest) to 1; default: 0.5"
    )
    parser.add_argument("--folds", metavar="N", type=int, default=5, help="of the cross-validation; default: 5")


def run(parsed: argparse.Namespace) -> None:
    """Writes FILE and FILE's name with .json. Raises whatever `teaching.teach` raises."""
    import torch

    from stitch.cli.arguments import named
    from stitch.cluster import load_cluster
    from stitch.progress import ProgressLine
    from stitch_training.labels import read_labels
    from stitch_training.probe import TeachingSettings, cheapest_first, teach

    cluster = load_cluster(parsed.cluster)
    dtype = getattr(torch, parsed.dtype)
    settings = TeachingSettings(cluster, parsed.tokens, parsed.budget, parsed.folds, dtype, parsed.chat)
    routes, renamed = cheapest_first(cluster), named(parsed.rename, "rename")
    sets = [read_labels(path, routes, renamed) for path in parsed.data]
    use_threads(parsed)
    with ProgressLine(sys.stderr) as progress:
        write(teach(settings, sets, progress), parsed.out)


def write(taught: Taught, out: Path) -> None:
    """The artefact and its report; prints the figures."""
    import json

    from stitch_training.router_report import as_json, table

    taught.probe.save(out)
    report = {source: as_json(found) for source, found in taught.found.items()}
    whole = {"probe": taught.probe.fingerprint, "training": taught.probe.training, "unseen": report}
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    for source, found in taught.found.items():
        for pair, ranked in found.items():
            print(table(f"{source}, {pair}, rows unseen:", ranked), end="\n\n")
    print(f"{out}: fingerprint {taught.probe.fingerprint}, with its report (.json)")
