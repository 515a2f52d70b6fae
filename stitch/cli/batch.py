"""`stitch batch`: a file of requests, a file of answers. Doesn't know how a request is encoded or answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stitch.cli.arguments import request_fields
from stitch.cli.batch_file import Outcomes, answered_lines, outcome_lines, read_lines
from stitch.cli.connection import gateway
from stitch.client import AsyncClient


def run(parsed: argparse.Namespace) -> int:
    """Answers every line; returns 1 where one of them has an error."""
    lines = read_lines(Path(parsed.file))
    kept = answered_lines(Path(parsed.out)) if parsed.resume else {}
    failed = asyncio.run(_answer(lines, kept, parsed))
    print(f"{len(lines) - failed} answered, {failed} failed: {parsed.out}", file=sys.stderr)
    return 1 if failed else 0


async def _answer(lines: list[bytes], kept: dict[int, str], parsed: argparse.Namespace) -> int:
    """Writes the outcome of every line; returns how many are errors."""
    failed = 0
    async with AsyncClient(*gateway(parsed)) as client:
        with Outcomes(Path(parsed.out), kept) as outcomes, _progress() as progress:
            found = outcome_lines(client, lines, kept, request_fields(parsed), parsed.concurrency)
            task = progress.add_task("answering", total=len(lines))
            async for line in found:
                outcomes.write(line)
                failed += "error" in json.loads(line)
                progress.advance(task)
    return failed


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)
