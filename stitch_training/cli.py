"""The command `stitch-train`: makes stitches, probes and routers, offline. Parses, then calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stitch_training import (
    evaluate_command,
    fit_command,
    label,
    probe_calibrate_command,
    probe_command,
    router_calibrate,
    router_evaluate,
    router_train,
    sweep_command,
)

VERBS = {
    "fit": (fit_command, fit_command.PURPOSE),
    "sweep": (sweep_command, sweep_command.PURPOSE),
    "evaluate": (evaluate_command, evaluate_command.PURPOSE),
    "probe": (probe_command, probe_command.PURPOSE),
    "calibrate-probe": (probe_calibrate_command, probe_calibrate_command.PURPOSE),
    "label": (label, "run prompts through the routes of a running cluster and note how good each answer is"),
    "router": (router_train, "make a router from labelled prompts"),
    "calibrate": (router_calibrate, "find the thresholds that keep a router within a budget"),
    "evaluate-router": (router_evaluate, "compare a router with chance, prompt length and the best possible"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for a wrong request or files that do not fit together; 1 for a failure outside."""
    parsed = build_parser().parse_args(arguments)
    # Imported after parsing, so that --help is instant.
    from stitch.errors import StitchError

    try:
        status: int = parsed.call(parsed) or 0
    except (StitchError, OSError) as error:
        print(f"stitch-train: {error}", file=sys.stderr)
        return 2 if isinstance(error, StitchError) else 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all verbs and their flags."""
    parser = argparse.ArgumentParser(prog="stitch-train", description="Makes stitches, probes and routers.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (command, purpose) in VERBS.items():
        verb = verbs.add_parser(name, help=purpose, description=purpose)
        command.add_arguments(verb)
        verb.set_defaults(call=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
