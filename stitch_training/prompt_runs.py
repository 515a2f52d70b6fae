"""Sends prompts to a running cluster, many in flight, and appends a line for each to a file.

A line is appended as its prompt finishes, so an interrupted run resumes. A prompt that fails is left out, and retried
by the next run.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar

from stitch.client import AsyncClient
from stitch.errors import InvalidRequest, StitchError

ANSWER_TIMEOUT_SECONDS = 600.0
_REPORT_INTERVAL_SECONDS = 5.0
Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class GatewayConnection:
    """A gateway, and what a client shows it."""

    address: str
    # PEM file of the authority that signed the gateway's certificate; None: no TLS.
    authority: Path | None = None
    # Whether to reach the gateway through the proxy that the environment names.
    proxy: bool = False
    # The tenant's key at the gateway; None: none is needed.
    key: str | None = field(default=None, repr=False)
    # PEM file with this client's certificate and key; None: the gateway asks for none.
    certificate: Path | None = None

    def open(self) -> AsyncClient:
        """Returns a client; to be called in a running event loop."""
        return AsyncClient(self.address, self.authority, self.proxy, self.key, self.certificate)


@dataclass
class RunProgress:
    """The number of prompts that are done, and that failed."""

    total: int
    done: int = 0
    failed: int = 0

    def line(self, seconds: float) -> str:
        rate = self.done / max(seconds, 1e-9)
        return f"{self.done:,} of {self.total:,} done, {self.failed:,} failed, {rate:.1f}/s"


async def append_lines(
    prompts: Sequence[Prompt],
    line_of: Callable[[Prompt], Awaitable[str]],
    out: TextIO,
    concurrency: int,
    report: Callable[[RunProgress], None] = lambda progress: None,
) -> RunProgress:
    """Writes the line of each prompt that does not fail with a StitchError, with `concurrency` prompts in flight.

    Raises InvalidRequest for a concurrency under one.
    """
    if concurrency < 1:
        raise InvalidRequest("concurrency", concurrency, "it must be at least 1")
    progress, queue = RunProgress(len(prompts)), iter(prompts)

    async def work() -> None:
        # All workers draw from one iterator, so each prompt has one worker.
        for prompt in queue:
            try:
                line = await line_of(prompt)
            except StitchError as error:
                progress.failed += 1
                print(f"stitch-train: {error}", file=sys.stderr)
            else:
                out.write(line)
                out.flush()
                progress.done += 1
            report(progress)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(concurrency, len(prompts))):
            workers.create_task(work())
    return progress


def open_for_append(out: Path) -> TextIO:
    """Opens the output for appending, and creates its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.open("a", encoding="utf-8")


def drop_incomplete_line(out: Path) -> None:
    """Truncates the incomplete last line of a run that was killed."""
    with out.open("rb+") as file:
        end = file.read().rfind(b"\n") + 1
        file.seek(end, os.SEEK_SET)
        file.truncate()


def reporter() -> Callable[[RunProgress], None]:
    """Returns a function that prints progress every few seconds and at the end."""
    started_at = reported_at = time.monotonic()

    def report(progress: RunProgress) -> None:
        nonlocal reported_at
        now = time.monotonic()
        is_last = progress.done + progress.failed == progress.total
        if now - reported_at >= _REPORT_INTERVAL_SECONDS or is_last:
            reported_at = now
            print(progress.line(now - started_at), file=sys.stderr)

    return report
