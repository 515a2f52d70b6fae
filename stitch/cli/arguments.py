"""Flags that several verbs share. Doesn't know the limits of a request's values: the gateway does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_Kind = Callable[[str], Any]

# Name, type, metavar, explanation.
_SAMPLING: tuple[tuple[str, _Kind, str, str], ...] = (
    ("max_tokens", int, "N", "the most tokens to generate"),
    ("temperature", float, "T", "0 is greedy, which is the default"),
    ("top_k", int, "K", "keep the K likeliest tokens"),
    ("top_p", float, "P", "keep the likeliest tokens that make up P"),
    ("min_p", float, "P", "drop tokens less likely than P times the likeliest"),
    ("repetition_penalty", float, "R", "divide the logits of tokens already seen"),
    ("presence_penalty", float, "R", "subtract from the logits of tokens already generated"),
    ("frequency_penalty", float, "R", "the same for every time that they were"),
    ("seed", int, "N", "same seed, same text"),
    ("logprobs", int, "N", "report log-probabilities and N alternatives (with --json)"),
)
_OTHERS = ("route", "stop", "stop_token_ids", "forced_token_ids", "forced_answer", "ignore_eos")
_OBJECTIVES: tuple[tuple[str, _Kind, str, str], ...] = (
    ("max_ttft_seconds", float, "S", "take a route whose first text is predicted to come within S seconds"),
    ("max_cost", float, "C", "take a route that costs at most C times what the dearest does"),
    ("min_quality", float, "Q", "take the cheapest route whose answer a learned router expects to be worth Q"),
)


def add_generation(verb: argparse.ArgumentParser) -> None:
    """What decides the route, and what decides the next token."""
    group = verb.add_argument_group("route")
    group.add_argument("--route", metavar="R", help="a route's name; by default the router decides")
    for name, kind, metavar, explanation in _OBJECTIVES:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=explanation)
    group = verb.add_argument_group("generation")
    for name, kind, metavar, explanation in _SAMPLING:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=explanation)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument(
        "--stop-token-id", dest="stop_token_ids", action="append", type=int, metavar="ID", help="end at this token"
    )
    group.add_argument(
        "--forced-token-id",
        dest="forced_token_ids",
        action="append",
        type=int,
        metavar="ID",
        help="begin with this token; may be repeated",
    )
    group.add_argument("--forced-answer", metavar="TEXT", help="answer this; --logprobs says how likely it is")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the model's end token")


def request_fields(parsed: argparse.Namespace) -> dict[str, Any]:
    """What `add_generation` has read, as fields of a request; what was not given is absent."""
    tabled = (name for name, *_ in (*_OBJECTIVES, *_SAMPLING))
    names = (*_OTHERS, *tabled)
    given = {name: getattr(parsed, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def add_gateway(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--gateway", metavar="HOST:PORT", help="default: the cluster that runs on this machine")
    add_authority(verb)


def add_authority(verb: argparse.ArgumentParser) -> None:
    """Whose signature on a gateway's certificate is believed."""
    verb.add_argument("--authority", type=Path, metavar="FILE", help="a PEM file: connect by TLS to whom it has signed")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def lengths(text: str) -> tuple[int, ...]:
    """Different whole numbers from 1 on, separated by commas, for argparse."""
    found = tuple(sorted({positive(part) for part in text.split(",")}))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"a line needs two lengths or more, not {text}")
    return found


def named(pairs: Sequence[str], field: str) -> dict[str, str]:
    """`["a=b"]` as {"a": "b"}; InvalidRequest where one has no `=`."""
    # Only now, so that --help is instant.
    from stitch.errors import InvalidRequest

    for pair in pairs:
        if not all(pair.partition("=")):
            raise InvalidRequest(field, pair, "it must be NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
