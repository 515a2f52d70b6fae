"""The `stitch` command: parses its arguments, then imports and calls one verb, so that `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from stitch.cli.arguments import (
    add_gateway,
    add_generation,
    duration,
    lengths,
    output_file,
    positive,
    tenant_name,
    utf8,
)
from stitch.environment import prepare_program

INTERRUPTED = 130
DEFAULT_CLUSTER = "smollm2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code: 0, 1 for a failure, 2 for bad usage, 130 for Ctrl-C."""
    prepare_program()
    parsed = parser().parse_args(arguments)
    try:
        return _VERBS[parsed.verb].run(parsed)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _interrupted(error):
            return INTERRUPTED
        # `sentence` raises a defect of this program again.
        print(f"stitch: {import_module('stitch.cli.output').sentence(error)}", file=sys.stderr)
        return 1


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused the error: a lock that gRPC acquires just then raises an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(prog="stitch", description="Two pretrained language models, served as one.")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.help, description=verb.help))
    return whole


def _up(verb: argparse.ArgumentParser) -> None:
    _cluster(verb)
    verb.add_argument("--detach", action="store_true", help="return when it serves; `stitch down` stops it")


def _down(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("cluster", nargs="?", metavar="CLUSTER", help="its name or file; default: the one that runs")


def _ask(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("prompt", type=utf8, metavar="PROMPT", help="the question; `-` reads it from standard input")
    verb.add_argument("--plain", action="store_true", help="send the prompt as it is, without the chat template")
    verb.add_argument("--system", type=utf8, metavar="TEXT", help="the system message before the question")
    verb.add_argument("--json", action="store_true", help="print one JSON object when the answer is complete")
    verb.add_argument("--timeout", type=duration, metavar="SECONDS", help="give up after this time")
    add_generation(verb)
    add_gateway(verb)


def _chat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--system", type=utf8, metavar="TEXT", help="the system message before the conversation")
    add_generation(verb)
    add_gateway(verb)


def _batch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "file",
        metavar="FILE.jsonl",
        help='one request per line: {"prompt": …} or {"messages": […]}, …; `-`: standard input',
    )
    verb.add_argument(
        "--out",
        required=True,
        metavar="FILE.jsonl",
        help="one answer or error per line, in order; `-`: standard output",
    )
    verb.add_argument("--resume", action="store_true", help="keep the answers in --out and request only the others")
    verb.add_argument("--concurrency", type=positive, default=16, metavar="N", help="requests at once (16)")
    add_generation(verb)
    add_gateway(verb)


def _status(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    add_gateway(verb)


def _ttft(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--lengths", type=lengths, default=(32, 64, 128, 256, 512), metavar="N,N,…", help="prompt lengths in tokens"
    )
    verb.add_argument("--repeat", type=positive, default=3, metavar="N", help="measurements of each point (3)")
    verb.add_argument("--out", type=output_file, metavar="FILE.png", help="draw the points and lines")
    verb.add_argument("--json", type=output_file, metavar="FILE", help="write every sample and the lines")
    add_gateway(verb)


def _demo(verb: argparse.ArgumentParser) -> None:
    _cluster(verb)
    verb.add_argument(
        "--out",
        type=output_file,
        default="demo/ttft.png",
        metavar="FILE.png",
        help="where the plot goes (demo/ttft.png)",
    )


def _keys(verb: argparse.ArgumentParser) -> None:
    verbs = verb.add_subparsers(required=True, metavar="COMMAND")
    explanation = "print a key, and what a keys file says of it"
    new = verbs.add_parser("new", help=explanation, description=explanation)
    new.add_argument("tenant", type=tenant_name, metavar="TENANT", help="its name in the keys file")


def _certs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or a preset's name")
    verb.add_argument("--out", required=True, metavar="DIR", help="the folder; what it has already is kept")
    verb.add_argument("--days", type=positive, default=90, metavar="N", help="validity of the certificates (90)")
    verb.add_argument("--renew", nargs="*", metavar="NAME", help="replace these; without names: all")
    verb.add_argument("--client", action="append", default=[], metavar="NAME", help="one for this client, too")
    verb.add_argument(
        "--host", action="append", default=[], metavar="NAME=HOST", help="a further host name or IP of a process"
    )


def _cluster(verb: argparse.ArgumentParser) -> None:
    explanation = f"a cluster file, or a preset's name ({DEFAULT_CLUSTER})"
    verb.add_argument("cluster", nargs="?", default=DEFAULT_CLUSTER, metavar="CLUSTER", help=explanation)


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's help, its arguments, and the module and function that run it."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    function: str = "run"

    def run(self, parsed: argparse.Namespace) -> int:
        """Imports the module and calls the function; returns the exit code."""
        code: int = getattr(import_module(self.module), self.function)(parsed)
        return code


_VERBS = {
    "up": Verb("Start a cluster on this machine.", _up, "stitch.cli.up"),
    "down": Verb("Stop a cluster that `up --detach` has started.", _down, "stitch.cli.up", "run_down"),
    "ask": Verb("Ask one question and print the answer while it is generated.", _ask, "stitch.cli.ask"),
    "chat": Verb("Hold a conversation.", _chat, "stitch.cli.chat"),
    "batch": Verb("Answer a file of requests.", _batch, "stitch.cli.batch"),
    "status": Verb("Show models, routes and shards.", _status, "stitch.cli.status"),
    "ttft": Verb("Measure the time to the first token against the prompt's length.", _ttft, "stitch.cli.ttft"),
    "keys": Verb("Make a key for a client.", _keys, "stitch.cli.keys"),
    "certs": Verb("Make the certificates of a cluster.", _certs, "stitch.cli.certs"),
    "demo": Verb("Show everything once, on this machine.", _demo, "stitch.cli.demo"),
}

if __name__ == "__main__":
    sys.exit(main())
