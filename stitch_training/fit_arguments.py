"""Flags that fitting, sweeping and evaluating share. Imports no torch, so that help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from stitch.errors import InvalidRequest
from stitch_training.packing import DataSettings


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Which models, and how to compute them."""
    parser.add_argument("cluster", metavar="CLUSTER", help="a cluster file, or the name of a preset")
    kinds = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=kinds, default="float32", help="how the models compute; default: float32")
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="processor threads; default: all cores")


def add_data(parser: argparse.ArgumentParser, tokens: int | None = None) -> None:
    """Which text, and how much of it; by default `tokens` tokens to fit on, if anything is to be fitted."""
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", type=Path, required=True, help="text, JSONL, chat JSONL; .gz too"
    )
    parser.add_argument("--held-out-tokens", metavar="N", type=int, default=8192, help="to judge on; default: 8192")
    parser.add_argument("--sequence-tokens", metavar="N", type=int, default=512, help="in one sequence; default: 512")
    if tokens is not None:
        parser.add_argument("--tokens", metavar="N", type=int, default=tokens, help=f"to fit on; default: {tokens}")
        parser.add_argument(
            "--shares", metavar="N", nargs="+", type=int, default=[], help="sequences of each FILE in turn; default: 1"
        )
        parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the order of the data; default: 0")


def add_work(parser: argparse.ArgumentParser) -> None:
    """Where passes over the data are kept."""
    parser.add_argument(
        "--work", metavar="DIR", type=Path, help="kept for resuming and for other fits; default: FILE.work"
    )
    parser.add_argument(
        "--reuse", metavar="DIR", nargs="+", type=Path, default=[],
        help="work of earlier passes: what they went over does not pass the bottom model again",
    )  # fmt: skip


def data_settings(parsed: argparse.Namespace) -> DataSettings:
    """The data's flags. Raises InvalidRequest where one is out of its range."""
    given = vars(parsed)
    for field, least in (("tokens", 1), ("held_out_tokens", 1), ("sequence_tokens", 16)):
        if given.get(field, least) < least:
            raise InvalidRequest(field, getattr(parsed, field), f"it must be at least {least}")
    shares = tuple(given.get("shares", ()))
    if shares and (len(shares) != len(parsed.data) or min(shares) < 1):
        raise InvalidRequest("shares", shares, f"it must be one number over 0 for each of {len(parsed.data)} files")
    return DataSettings(
        files=tuple(parsed.data),
        tokens=given.get("tokens", 0),
        held_out_tokens=parsed.held_out_tokens,
        sequence_tokens=parsed.sequence_tokens,
        seed=given.get("seed", 0),
        shares=shares,
    )


def use_threads(parsed: argparse.Namespace) -> None:
    """Lets torch use `--threads` threads."""
    import torch

    if parsed.threads > 0:
        torch.set_num_threads(parsed.threads)
