"""The verb `stitch-server sweep`: flags in, the ladder of many cuts out. Knows no method."""

from __future__ import annotations

import argparse
from pathlib import Path

from stitch.errors import InvalidRequest
from stitch.progress import ProgressLine
from stitch_training.fit_arguments import add_cluster, add_data, add_work, data_settings, use_threads

PURPOSE = "compare many cuts by least squares from one pass over the data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_cluster(parser)
    add_data(parser, tokens=50_000)
    parser.add_argument(
        "--cuts", metavar="K:J,J,…", nargs="+", default=[], help="such as 20:12,14,15 24:17; default: a grid of both"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .json file; the plot lies beside it")
    add_work(parser)


def run(parsed: argparse.Namespace) -> None:
    """Sweeps, and writes FILE and FILE's name with .png. Raises whatever `sweeping.sweep` raises."""
    cuts = tuple(cut for text in parsed.cuts for cut in parse_cuts(text))

    from stitch.cluster import load_cluster
    from stitch_training.fit_report import write_json
    from stitch_training.sweep import SweepSettings, sweep

    settings = SweepSettings(
        cluster=load_cluster(parsed.cluster),
        cuts=cuts,
        data=data_settings(parsed),
        dtype=parsed.dtype,
        work=parsed.work or parsed.out.with_name(parsed.out.name + ".work"),
        reuse=tuple(parsed.reuse),
    )
    use_threads(parsed)
    with ProgressLine() as progress:
        ladder, about = sweep(settings, progress)
    write_json(parsed.out, {**about, "systems": ladder.rows()})
    ladder.plot(parsed.out.with_suffix(".png"))
    print("\n".join(ladder.lines()))


def parse_cuts(text: str) -> list[tuple[int, int]]:
    """`20:12,14` as (20, 12), (20, 14). Raises InvalidRequest where it is no such thing."""
    bottom, colon, tops = text.partition(":")
    if not colon or not all(part.isdecimal() for part in (bottom, *tops.split(","))):
        raise InvalidRequest("cuts", text, "a cut is written K:J or K:J,J, with layer numbers")
    return [(int(bottom), int(top)) for top in tops.split(",")]
