"""`router-gateway label`: what each route of a running cluster makes of prompts. Knows no router.

Lines are appended as prompts finish, so an interrupted run goes on where it was; a prompt that fails is left out, and
tried again by the next run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from stitch.cli.arguments import add_authority
from stitch_training.quality import Graded, Routes, grade
from stitch_training.router_arguments import said

if TYPE_CHECKING:
    from stitch.client import AsyncClient

Row: TypeAlias = Mapping[str, Any]

# Seconds that one answer may take.
ANSWER_TIMEOUT_SECONDS = 600.0
_REPORT_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class ClusterRoutes:
    """The routes behind a gateway, asked greedily."""

    client: AsyncClient
    max_tokens: int
    # Prompts go as they are, not as a chat.
    plain: bool

    async def answer(self, prompt: str, route: str) -> str:
        """See `Routes`."""
        asked = self._asked(prompt, route) | {"temperature": 0.0}
        return (await self.client.generate(**asked, timeout=ANSWER_TIMEOUT_SECONDS)).text

    async def likelihood(self, prompt: str, route: str, answer: str) -> float:
        """See `Routes`; of the answer's first `max_tokens` tokens."""
        asked = self._asked(prompt, route) | {"forced_answer": answer, "logprobs": 0, "ignore_eos": True}
        found = await self.client.generate(**asked, timeout=ANSWER_TIMEOUT_SECONDS)
        return math.exp(fmean(token.logprob for token in found.logprobs))

    def _asked(self, prompt: str, route: str) -> dict[str, Any]:
        said = {"prompt": prompt} if self.plain else {"messages": [{"role": "user", "content": prompt}]}
        return {**said, "route": route, "max_tokens": self.max_tokens}


@dataclass
class Progress:
    """How far a run is."""

    total: int
    done: int = 0
    failed: int = 0

    def line(self, seconds: float) -> str:
        return (
            f"{self.done:,} of {self.total:,} labelled, {self.failed:,} failed, {self.done / max(seconds, 1e-9):.1f}/s"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `label`."""
    parser.add_argument("--gateway", metavar="HOST:PORT", required=True, help="of a running cluster")
    add_authority(parser)
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON lines with prompt; answer or reference where known",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="where labels go; a run goes on with it"
    )
    parser.add_argument("--routes", metavar="NAME,…", help="cheapest first; default: all of the cluster")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=256, help="of an answer; default: 256")
    parser.add_argument("--at-once", metavar="N", type=int, default=8, help="prompts under way; default: 8")
    parser.add_argument("--plain", action="store_true", help="send prompts as they are, not as a chat")


def run(args: argparse.Namespace) -> int:
    """The exit status: 1 where prompts failed."""
    failed: list[int] = []
    status = said(lambda: failed.append(asyncio.run(_labelled(args))))
    return status or int(bool(failed[0]))


async def _labelled(args: argparse.Namespace) -> int:
    from stitch.client import AsyncClient

    rows = remaining(read_rows(args.data), args.out)
    async with AsyncClient(args.gateway, args.authority) as client:
        given = args.routes.split(",") if args.routes else [route.name for route in (await client.describe()).routes]

        routes = ClusterRoutes(client, args.max_tokens, args.plain)
        with open_for_more(args.out) as out:
            progress = await label(rows, given, routes, out, args.at_once, _reporter())
    return progress.failed


async def label(
    rows: Sequence[Row],
    names: Sequence[str],
    routes: Routes,
    out: TextIO,
    at_once: int,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Writes one line for each row that every named route answered, as they come, `at_once` rows under way.

    Raises InvalidRequest for fewer than two routes: one alone has nothing to be compared with.
    """
    from stitch.errors import InvalidRequest, StitchError

    if len(names) < 2 or at_once < 1:
        field, value = ("routes", list(names)) if len(names) < 2 else ("at_once", at_once)
        raise InvalidRequest(field, value, "there must be at least two routes, and one prompt at once")
    progress, waiting = Progress(len(rows)), iter(rows)

    async def work() -> None:
        # All workers draw from one iterator, so each row has one worker.
        for row in waiting:
            try:
                line = _line(row, await grade(row, names, routes))
            except StitchError as error:
                progress.failed += 1
                print(f"router-gateway: {error}", file=sys.stderr)
            else:
                out.write(line)
                out.flush()
                progress.done += 1
            report(progress)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(at_once, len(rows))):
            workers.create_task(work())
    return progress


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; `question` stands for `prompt` where there is none. InvalidRequest where a line is off."""
    from stitch_training.labels import read_json_lines

    return [row for _, row in read_json_lines(path)]


def remaining(rows: Sequence[Row], out: Path) -> list[Row]:
    """The rows whose prompts the output doesn't have yet, each prompt once."""
    from stitch_training.labels import read_json_lines

    done = set()
    if out.exists():
        _drop_torn_line(out)
        done = {row["prompt"] for _, row in read_json_lines(out)}
    fresh = {row["prompt"]: row for row in rows if row["prompt"] not in done}
    return list(fresh.values())


def open_for_more(out: Path) -> TextIO:
    """The output, to append to."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.open("a", encoding="utf-8")


def _drop_torn_line(out: Path) -> None:
    """Cuts off what a killed run left of its last line."""
    with out.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.seek(whole, os.SEEK_SET)
        file.truncate()


def _line(row: Row, graded: Graded) -> str:
    label = {"prompt": row["prompt"], "routes": graded.qualities, "measure": graded.measure}
    if "task" in row:
        label["task"] = row["task"]
    return json.dumps(label, ensure_ascii=False) + "\n"


def _reporter() -> Callable[[Progress], None]:
    """Says how far it is, every few seconds and at the end."""
    began = said_at = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal said_at
        now = time.monotonic()
        if now - said_at >= _REPORT_EVERY_SECONDS or progress.done + progress.failed == progress.total:
            said_at = now
            print(progress.line(now - began), file=sys.stderr)

    return report
