"""The verb `stitch-server evaluate`: flags in, the quality of a cluster's routes out. Knows no method."""

from __future__ import annotations

import argparse
from pathlib import Path

from stitch.errors import InvalidRequest
from stitch.progress import ProgressLine
from stitch_training.fit_arguments import add_cluster, add_data, data_settings, use_threads

PURPOSE = "measure both models and every route on held-out text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_cluster(parser)
    add_data(parser)
    parser.add_argument(
        "--held-out-percent", metavar="P", type=int, default=10,
        help="of documents to judge on; 10 are those that no fit has seen, 100 is for files that no fit was given",
    )  # fmt: skip
    parser.add_argument("--gold", metavar="FILE", type=Path, help="questions to ask; each has its `answer`")
    parser.add_argument("--gold-rows", metavar="N", type=int, default=100, help="of --gold; default: 100")
    parser.add_argument("--gold-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    parser.add_argument("--out", metavar="FILE", type=Path, help="a .json file; the plot lies beside it")


def run(parsed: argparse.Namespace) -> None:
    """Prints the table; writes FILE and FILE's name with .png. Raises whatever `evaluating.evaluate` raises."""
    if not 1 <= parsed.held_out_percent <= 100:
        raise InvalidRequest("held_out_percent", parsed.held_out_percent, "it must be 1 to 100")
    for field in ("gold_rows", "gold_tokens"):
        if getattr(parsed, field) < 1:
            raise InvalidRequest(field, getattr(parsed, field), "it must be at least 1")

    from stitch.cluster import load_cluster
    from stitch_training.evaluate import EvaluationSettings, evaluate
    from stitch_training.fit_report import write_json

    settings = EvaluationSettings(
        load_cluster(parsed.cluster),
        data_settings(parsed),
        parsed.dtype,
        parsed.held_out_percent,
        parsed.gold,
        parsed.gold_rows,
        parsed.gold_tokens,
    )
    use_threads(parsed)
    with ProgressLine() as progress:
        ladder = evaluate(settings, progress)
    print("\n".join(ladder.lines()))
    if parsed.out is not None:
        files = [path.name for path in settings.data.files]
        write_json(parsed.out, {"dtype": parsed.dtype, "files": files, "systems": ladder.rows()})
        ladder.plot(parsed.out.with_suffix(".png"))
