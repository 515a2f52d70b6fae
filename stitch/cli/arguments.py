"""Flags that several verbs share, and what they mean; the gateway checks the limits of a request's values.

Imports no library at the top, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_Kind = Callable[[str], Any]

# Name, type, metavar, explanation.
_SAMPLING: tuple[tuple[str, _Kind, str, str], ...] = (
    ("max_tokens", int, "N", "the most tokens to generate"),
    ("min_tokens", int, "N", "no end token and no stop text before N tokens"),
    ("n", int, "N", "N answers, which share the prompt's computation"),
    ("temperature", float, "T", "0 is greedy, which is the default"),
    ("top_k", int, "K", "keep the K likeliest tokens"),
    ("top_p", float, "P", "keep the likeliest tokens that make up P"),
    ("min_p", float, "P", "drop tokens less likely than P times the likeliest"),
    ("repetition_penalty", float, "R", "divide the logits of tokens in the context"),
    ("presence_penalty", float, "R", "subtract from the logits of tokens already generated"),
    ("frequency_penalty", float, "R", "subtract once for every time a token was generated"),
    ("seed", int, "N", "same seed, same text"),
    ("logprobs", int, "N", "report log-probabilities and N alternatives (with --json)"),
)
_OTHERS = ("route", "threshold", "stop", "stop_token_ids", "forced_token_ids", "forced_answer", "ignore_eos")
_OBJECTIVES: tuple[tuple[str, _Kind, str, str], ...] = (
    ("max_ttft_seconds", float, "S", "take a route whose first text is predicted to come within S seconds"),
    ("max_cost", float, "C", "take a route that costs at most C times as much as the most expensive"),
    ("min_quality", float, "Q", "take the cheapest route whose answer has an expected quality of at least Q"),
)


def add_generation(verb: argparse.ArgumentParser) -> None:
    """The flags of the route's choice and of sampling."""
    group = verb.add_argument_group("route")
    group.add_argument("--route", metavar="R", help="a route's name; by default the router decides")
    group.add_argument("--threshold", type=float, metavar="T", help="the most expensive route from this score on")
    for name, kind, metavar, explanation in _OBJECTIVES:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=explanation)
    group = verb.add_argument_group("generation")
    for name, kind, metavar, explanation in _SAMPLING:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=explanation)
    group.add_argument(
        "--stop", action="append", type=utf8, metavar="TEXT", help="end before this text; may be repeated"
    )
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
    group.add_argument(
        "--forced-answer", type=utf8, metavar="TEXT", help="return this text (with --logprobs: how likely it is)"
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=token_bias,
        metavar="ID=B",
        help="add B to the logit of this token; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="generate past the model's end token")


def request_fields(parsed: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_generation` as fields of a request, without those that were not given."""
    names = (*_OTHERS, *(name for name, *_ in (*_OBJECTIVES, *_SAMPLING)))
    given = {name: getattr(parsed, name) for name in names}
    if parsed.logit_bias is not None:
        given["logit_bias"] = dict(parsed.logit_bias)
    return {name: value for name, value in given.items() if value is not None}


def add_gateway(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--gateway", metavar="HOST:PORT", help="default: the cluster that runs on this machine")
    add_connection(verb)


def add_connection(verb: argparse.ArgumentParser) -> None:
    """The flags of how to reach the gateway: its authority, a proxy, and the client's own key or certificate."""
    verb.add_argument(
        "--authority", type=Path, metavar="FILE", help="connect by TLS and trust the authority in this PEM file"
    )
    verb.add_argument(
        "--proxy", action="store_true", help="connect through the HTTP proxy that $https_proxy or $http_proxy names"
    )
    verb.add_argument("--key", type=Path, metavar="FILE", help="a file with the tenant's key; default: $STITCH_KEY")
    verb.add_argument("--certificate", type=Path, metavar="FILE", help="a PEM file with a client's certificate and key")


def gateway_endpoint(parsed: argparse.Namespace) -> tuple[str, Path | None, bool, str | None, Path | None]:
    """What a client takes: address, authority, proxy, key, certificate; by default of the cluster on this machine.

    Raises Unavailable where no cluster runs, InvalidRequest where the key's file can't be read.
    """
    if parsed.gateway:
        return parsed.gateway, parsed.authority, parsed.proxy, gateway_key(parsed), parsed.certificate
    from stitch.local.run_folder import only_running_cluster

    address, authority = only_running_cluster().cluster().gateway_endpoint
    return address, parsed.authority or authority, parsed.proxy, gateway_key(parsed), parsed.certificate


def gateway_key(parsed: argparse.Namespace) -> str | None:
    """The content of `--key`, by default $STITCH_KEY: no key is an argument, which other users of a machine see."""
    from stitch.environment import client_key
    from stitch.errors import InvalidRequest

    if parsed.key is None:
        return client_key()
    try:
        return str(parsed.key.read_text().strip())
    except (OSError, ValueError) as error:
        raise InvalidRequest("--key", str(parsed.key), "it must be a text file with the key alone") from error


def utf8(text: str) -> str:
    """A text argument, for argparse: Python decodes no UTF-8 where the locale is of ASCII alone."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return text


def output_file(text: str) -> str:
    """A path that can be written, for argparse: what takes minutes to measure must not be lost at the end."""
    path = Path(text)
    if path.is_dir() or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    existing = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
        raise argparse.ArgumentTypeError(f"{text} can't be written")
    return text


def duration(text: str) -> float:
    """Seconds above 0, for argparse; `inf` is allowed, and no limit."""
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 seconds")
    return seconds


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def token_bias(text: str) -> tuple[int, float]:
    """`ID=B`, for argparse."""
    token_id, _, bias = text.partition("=")
    if not (token_id.isascii() and token_id.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not ID=B")
    return int(token_id), float(bias)


def tenant_name(text: str) -> str:
    """The name of a section in a keys file, for argparse."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", text):
        raise argparse.ArgumentTypeError(f"{text} has other characters than a to z, 0 to 9, _ and -, or more than 63")
    return text


def lengths(text: str) -> tuple[int, ...]:
    """Distinct whole numbers of at least 1, separated by commas, for argparse."""
    found = tuple(sorted({positive(part) for part in text.split(",")}))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"a line needs two lengths or more, not {text}")
    return found


def named(pairs: Sequence[str], field: str) -> dict[str, str]:
    """`["a=b"]` as {"a": "b"}; InvalidRequest where one has no `=`."""
    from stitch.errors import InvalidRequest

    for pair in pairs:
        if not all(pair.partition("=")):
            raise InvalidRequest(field, pair, "it must be NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
