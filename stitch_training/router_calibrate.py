"""`router-gateway calibrate`: a budget to the thresholds that keep it. Knows no quality: prompts are enough."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stitch_training.router_arguments import add_data, named_numbers, said

if TYPE_CHECKING:
    from stitch.thresholds import Thresholds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    parser.add_argument("--router", metavar="FILE", type=Path, required=True, help="the artefact")
    add_data(parser, "prompts like those to come, which the training has not seen; labels are not needed")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", metavar="B", type=float, help="mean cost from 0, all cheapest, to 1, all dearest")
    target.add_argument("--cost", metavar="X", type=float, help="mean cost in the unit of --costs")
    parser.add_argument(
        "--costs",
        metavar="ROUTE=X",
        nargs="*",
        default=[],
        help="what a route costs, such as parameters read per token; default: equal steps",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: print them")


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    return said(lambda: calibrate(args.router, args.data, args.budget, args.cost, args.costs, args.out))


def calibrate(
    router: Path, data: list[Path], budget: float | None, cost: float | None, costs: list[str], out: Path | None
) -> None:
    """Writes or prints thresholds, and says what they come to.

    Raises InvalidRequest where the artefact, the data or the target is off.
    """
    import numpy as np

    from router_gateway.routing.learned.artifact import load_router
    from stitch.errors import InvalidRequest
    from stitch_training import calibration
    from stitch_training.labels import read_prompts

    artifact = load_router(router)
    routes, known = artifact.model.routes, named_numbers(costs, "costs")
    relative = calibration.relative_costs(routes, known)
    if budget is None:
        if known is None or cost is None:
            raise InvalidRequest("costs", costs, "--cost needs the cost of every route")
        budget = calibration.budget_for(cost, known, routes)
    prompts = [prompt for path in data for prompt in read_prompts(path)]
    gains = np.array([artifact.model.gains(prompt) for prompt in prompts], np.float64)
    found = calibration.calibrate(gains, relative, budget)
    _put(found.thresholds_file(routes, artifact.fingerprint, gains, relative), out)
    print(found.said(routes, len(prompts)), file=sys.stderr)


def _put(thresholds: Thresholds, out: Path | None) -> None:
    if out is None:
        print(thresholds.model_dump_json(indent=1))
    else:
        thresholds.write(out)
