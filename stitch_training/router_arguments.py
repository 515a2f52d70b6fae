"""Flags that several verbs share, and how they are read. Knows no verb.

Whatever takes long to import is imported when it is needed, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stitch.cli.arguments import named


def add_data(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--data and --rename."""
    parser.add_argument("--data", metavar="FILE", type=Path, nargs="+", required=True, help=purpose)
    parser.add_argument(
        "--rename",
        metavar="NAME=ROUTE",
        nargs="*",
        default=[],
        help="a name in the files stands for this route, such as qwen2.5-7b-instruct=weak",
    )


def named_numbers(pairs: Sequence[str], field: str) -> dict[str, float] | None:
    """`["a=1.5"]` as {"a": 1.5}, and nothing as None."""
    from stitch.errors import InvalidRequest

    try:
        return {name: float(value) for name, value in named(pairs, field).items()} or None
    except ValueError as error:
        raise InvalidRequest(field, list(pairs), "each must be NAME=NUMBER") from error


def said(command: Callable[[], None]) -> int:
    """Runs a verb: 0, or 2 after one sentence where its input is at fault, or 1 where the cluster or the disk is."""
    from stitch.errors import InvalidRequest, StitchError

    try:
        command()
    except InvalidRequest as error:
        return _failed(error, 2)
    except (StitchError, OSError) as error:
        return _failed(error, 1)
    return 0


def _failed(error: Exception, status: int) -> int:
    print(f"router-gateway: {error}", file=sys.stderr)
    return status
