"""The `stitch` command: parses, then calls one function. Doesn't know its verbs' work, so `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from stitch.cli.arguments import add_gateway, add_generation, lengths, positive

INTERRUPTED = 130
DEFAULT_CLUSTER = "smollm2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code: 0, 1 for a failure, 2 for bad usage, 130 for Ctrl-C."""
    parsed = parser().parse_args(arguments)
    try:
        code: int = import_module(f"stitch.cli.{parsed.verb}").run(parsed)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _interrupted(error):
            return INTERRUPTED
        # Raised again where it is none of the failures that a user can do something about.
        print(f"stitch: {import_module('stitch.cli.failures').sentence(error)}", file=sys.stderr)
        return 1


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C lies behind it: where that hits a lock that gRPC is taking, the lock complains in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(prog="stitch", description="Two pretrained language models, served as one.")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (explanation, add_arguments) in _VERBS.items():
        add_arguments(verbs.add_parser(name, help=explanation, description=explanation))
    return whole


def _up(verb: argparse.ArgumentParser) -> None:
    _cluster(verb)
    verb.add_argument("--detach", action="store_true", help="return once it serves; `stitch down` stops it")


def _down(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("cluster", nargs="?", metavar="CLUSTER", help="its name or file; default: the one that runs")


def _ask(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("prompt", metavar="PROMPT", help="the question; `-` reads it from standard input")
    verb.add_argument("--plain", action="store_true", help="send the prompt as it is, without the chat template")
    verb.add_argument("--system", metavar="TEXT", help="what the model is told before the question")
    verb.add_argument("--json", action="store_true", help="print one JSON object when the answer is complete")
    verb.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")
    add_generation(verb)
    add_gateway(verb)


def _chat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_generation(verb)
    add_gateway(verb)


def _batch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", metavar="FILE.jsonl", help='one request a line: {"prompt": …} or {"messages": […]}, …')
    verb.add_argument("--out", required=True, metavar="FILE.jsonl", help="one answer or error a line, in order")
    verb.add_argument("--resume", action="store_true", help="keep the answers in --out, ask for the rest alone")
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
    verb.add_argument("--out", metavar="FILE.png", help="draw the points and lines")
    verb.add_argument("--json", metavar="FILE", help="write every sample and the lines")
    add_gateway(verb)


def _demo(verb: argparse.ArgumentParser) -> None:
    _cluster(verb)
    verb.add_argument("--out", default="demo/ttft.png", metavar="FILE.png", help="where the plot goes (demo/ttft.png)")


def _cluster(verb: argparse.ArgumentParser) -> None:
    explanation = f"a cluster file, or a preset's name ({DEFAULT_CLUSTER})"
    verb.add_argument("cluster", nargs="?", default=DEFAULT_CLUSTER, metavar="CLUSTER", help=explanation)


_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "up": ("Start a cluster on this machine.", _up),
    "down": ("Stop a cluster that `up --detach` has started.", _down),
    "ask": ("Ask one question and watch the answer come.", _ask),
    "chat": ("Hold a conversation.", _chat),
    "batch": ("Answer a file of requests.", _batch),
    "status": ("Show models, routes and shards.", _status),
    "ttft": ("Measure the time to the first token against the prompt's length.", _ttft),
    "demo": ("Show everything once, on this machine.", _demo),
}

if __name__ == "__main__":
    sys.exit(main())
