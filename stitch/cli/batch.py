"""`stitch batch`: a JSONL file of requests becomes a JSONL file of answers and errors, line by line and in order.

The output file changes only at the end of a run, also of an interrupted one, so a later run can resume from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stitch.cli.arguments import gateway_endpoint, request_fields
from stitch.client import Answer, AsyncClient
from stitch.client.messages import generate_request
from stitch.errors import Exhausted, InvalidRequest, StitchError

# A full gateway is asked again after the time that it names, up to this many times.
MAX_ATTEMPTS = 20


def run(parsed: argparse.Namespace) -> int:
    """Answers every line; returns 1 where a line has an error."""
    lines = read_lines(Path(parsed.file))
    kept = answered_lines(Path(parsed.out)) if parsed.resume else {}
    failed = asyncio.run(_answer(lines, kept, parsed))
    print(f"{len(lines) - failed} answered, {failed} failed: {parsed.out}", file=sys.stderr)
    return 1 if failed else 0


async def _answer(lines: list[bytes], kept: dict[int, str], parsed: argparse.Namespace) -> int:
    """Writes the outcome of every line; returns the number of errors."""
    failed = 0
    async with AsyncClient(*gateway_endpoint(parsed)) as client:
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


def read_lines(file: Path) -> list[bytes]:
    """The lines of the file, one request each, valid or not."""
    return file.read_bytes().splitlines()


def answered_lines(out: Path) -> dict[int, str]:
    """The answers of earlier runs in `out`, by line number from 1; errors are left out."""
    found: dict[int, str] = {}
    for file in (out, _draft(out)):
        for line in file.read_text().splitlines() if file.exists() else []:
            record = _record(line)
            if isinstance(record.get("line"), int) and "error" not in record:
                found[record["line"]] = line
    return found


class Outcomes:
    """Writes outcomes in order to a draft, which replaces `out` at the end or at an interruption."""

    def __init__(self, out: Path, kept: Mapping[int, str]) -> None:
        self._out = out
        self._kept = kept
        self._written = 0
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """Writes the outcome of the input's next line."""
        if self._file is not None:
            print(line, file=self._file, flush=True)
            self._written += 1

    def __enter__(self) -> Self:
        # A lone surrogate in an id can't be encoded; JSON has an escape for it.
        self._file = _draft(self._out).open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            for number in sorted(number for number in self._kept if number > self._written):
                print(self._kept[number], file=self._file)
            self._file.close()
            _draft(self._out).replace(self._out)


async def outcome_lines(
    client: AsyncClient,
    lines: Sequence[bytes],
    kept: Mapping[int, str],
    defaults: Mapping[str, Any],
    concurrency: int,
) -> AsyncGenerator[str, None]:
    """One line of JSON for every request, in order; `defaults` holds for the fields that a line doesn't set."""
    slots = asyncio.Semaphore(concurrency)

    async def outcome(number: int, line: bytes) -> str:
        if number in kept:
            return kept[number]
        async with slots:
            record = {"line": number, **await _outcome(client, line, defaults)}
            return json.dumps(record, ensure_ascii=False)

    tasks = [asyncio.create_task(outcome(number, line)) for number, line in enumerate(lines, start=1)]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()


async def _outcome(client: AsyncClient, line: bytes, defaults: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    try:
        fields = _fields(line)
        named = {"id": fields.pop("id")} if "id" in fields else {}
        answer = await _generate(client, {**defaults, **fields})
    except StitchError as error:
        return {**named, "error": {"code": error.code.name, "message": str(error)}}
    except grpc.RpcError as error:
        return {**named, "error": {"code": error.code().name, "message": error.details()}}
    return {**named, **answer.as_json()}


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", line.decode(errors="replace"), f"it is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("line", fields, 'it must be an object such as {"prompt": "…"}')
    return fields


async def _generate(client: AsyncClient, fields: dict[str, Any]) -> Answer:
    """One answer; repeats the request while the gateway is full."""
    # Refuses fields that no request has; `generate` itself would accept `timeout`.
    generate_request(fields)
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await client.generate(**fields)
        except Exhausted as full:
            await asyncio.sleep(full.retry_after_seconds)
    return await client.generate(**fields)


def _draft(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _record(line: str) -> dict[str, Any]:
    """The outcome in a line of an earlier run; empty where the line is incomplete."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
