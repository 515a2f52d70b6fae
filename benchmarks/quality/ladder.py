"""Draws the ladder of a pair from the reports of its fits: loss against parameters read per token.

    python benchmarks/quality/ladder.py CLUSTER REPORT.json... --out ladder.json

Every report has both whole models and its stitch on the same held-out sequences; others are refused.
With `--files` only these files count, each with the same weight, and `all` is their mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import fmean
from typing import Any

from stitch.cluster import load_cluster
from stitch.environment import cache_folder
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.sources.resolve import resolve
from stitch_training.cost_ladder import BOTTOM, TOP, Ladder, Rung, stitched_parameters
from stitch_training.least_squares import CutPoint
from stitch_training.report import write_json
from stitch_training.scoring import Interval


def ladder_of(cluster_name: str, reports: list[dict[str, Any]], files: Sequence[str] = ()) -> Ladder:
    """Builds a ladder from reports and the models' files. Raises SystemExit where the reports don't fit together."""
    cluster = load_cluster(cluster_name)
    folders = [resolve(cluster.model_source(role), cache_folder()) for role in ("bottom", "top")]
    bottom, top = (ParameterCount.read(folder) for folder in folders)
    narrow, wide = (ModelDescription.read(folder, folder.name).hidden_size for folder in reversed(folders))
    first = reports[0]["losses"]
    rungs = []
    for report in reports:
        if (report["losses"]["bottom"], report["losses"]["top"]) != (first["bottom"], first["top"]):
            raise SystemExit("the reports are of other models or held-out sequences")
        k, j = report["cut"]["bottom_layers"], report["cut"]["top_from"]
        rank = report["training"].get("adapter_rank", 0)
        name = f"{k} → {j}, rank {rank}" if rank else f"{k} → {j}"
        read = stitched_parameters((bottom, top), (wide, narrow), CutPoint(k, j), rank)
        rungs.append(Rung(name, read, _intervals(report["losses"]["stitched"], files)))
    ends = [
        Rung(name, count.between(0, len(count.layers)) + count.head, _intervals(first[role], files))
        for name, count, role in ((BOTTOM, bottom, "bottom"), (TOP, top, "top"))
    ]
    return Ladder(ends[0], ends[1], tuple(rungs))


def _intervals(losses: dict[str, dict[str, float]], files: Sequence[str]) -> dict[str, Interval]:
    found = {name: Interval(**one) for name, one in losses.items()}
    whole = found.pop("all")
    if missing := set(files) - set(found):
        raise SystemExit(f"the reports have no file {', '.join(sorted(missing))}, only {', '.join(found)}")
    chosen = {name: found[name] for name in files or found}
    return {"all": _mean(list(chosen.values())) if files else whole} | chosen


def _mean(parts: list[Interval]) -> Interval:
    """Averages means over different sequences; their deviations are independent, so their squares add up."""
    mean = fmean(part.mean for part in parts)
    below = hypot(*(part.mean - part.low for part in parts)) / len(parts)
    above = hypot(*(part.high - part.mean for part in parts)) / len(parts)
    return Interval(mean, mean - below, mean + above)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cluster", metavar="CLUSTER")
    parser.add_argument("reports", metavar="REPORT.json", nargs="+", type=Path)
    parser.add_argument("--out", metavar="FILE.json", type=Path, required=True, help="its plot is a .png beside it")
    parser.add_argument("--files", metavar="NAME", nargs="+", default=[], help="held-out files to count; default: all")
    parsed = parser.parse_args()
    ladder = ladder_of(parsed.cluster, [json.loads(path.read_text()) for path in parsed.reports], parsed.files)
    print("\n".join(ladder.lines()))
    write_json(parsed.out, {"systems": ladder.rows()})
    ladder.plot(parsed.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
