"""The command `router-gateway`: parses the arguments, builds the settings, and runs the gateway.

Everything else is imported after parsing, so that --help is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stitch.environment import prepare_program


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 for an invalid argument or cluster; 1 where a port is in use or a file is missing."""
    prepare_program()
    parsed = build_parser().parse_args(arguments)
    from stitch.errors import StitchError

    try:
        status: int = parsed.call(parsed)
    except (StitchError, OSError) as error:
        print(f"router-gateway: {error}", file=sys.stderr)
        return 2 if isinstance(error, StitchError) else 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    parser = argparse.ArgumentParser(prog="router-gateway", description="The front door of a stitched cluster.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    purpose = "serve a cluster to its clients"
    run = commands.add_parser("run", help=purpose, description=purpose)
    run.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    run.add_argument("--listen", metavar="HOST:PORT", help="address for clients; default: the cluster file's")
    run.add_argument("--http", metavar="HOST:PORT", help="address for OpenAI's API; default: the cluster file's")
    run.add_argument("--metrics-port", metavar="N", type=int, help="0: any free port; default: the cluster file's")
    run.add_argument("--insecure", action="store_true", help="allow an address that other machines reach, without TLS")
    run.add_argument("--reflection", action="store_true", help="answer gRPC reflection beyond loopback, too")
    run.add_argument("--log-format", choices=("text", "json"), default="text", help="of the log; default: text")
    run.add_argument(
        "--drain-seconds", metavar="S", type=float, help="running answers' time after SIGTERM; default: 30"
    )
    run.add_argument(
        "--replay-wait-seconds", metavar="S", type=float, help="to retry an answer without a chain; default: 5"
    )
    run.set_defaults(call=_run)
    return parser


def _run(parsed: argparse.Namespace) -> int:
    import uvloop

    from router_gateway.config import from_flags
    from router_gateway.server import serve
    from stitch.logs import set_up_logging

    set_up_logging(parsed.log_format)
    uvloop.run(serve(from_flags(vars(parsed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
