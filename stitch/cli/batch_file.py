"""A file of requests becomes a file of outcomes, line by line and in order. Knows no terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import grpc

from stitch.client import Answer, AsyncClient
from stitch.client.messages import generate_request
from stitch.errors import Exhausted, InvalidRequest, StitchError

# A gateway that is full says when to come back; one that stays full that often is not going to have room.
MAX_ATTEMPTS = 20


def read_lines(file: Path) -> list[bytes]:
    """The lines of the file, one request each, readable or not."""
    return file.read_bytes().splitlines()


def answered_lines(out: Path) -> dict[int, str]:
    """The answers that earlier runs left in `out`, by the number of their line (from 1); errors are not kept."""
    found: dict[int, str] = {}
    for file in (out, _draft(out)):
        for line in file.read_text().splitlines() if file.exists() else []:
            record = _record(line)
            if isinstance(record.get("line"), int) and "error" not in record:
                found[record["line"]] = line
    return found


class Outcomes:
    """Writes outcomes in order; `out` changes only at the end, which may be an early one."""

    def __init__(self, out: Path, kept: Mapping[int, str]) -> None:
        self._out = out
        self._kept = kept
        self._written = 0
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """The outcome of the next line of the input."""
        if self._file is not None:
            print(line, file=self._file, flush=True)
            self._written += 1

    def __enter__(self) -> Self:
        # A lone surrogate in an id becomes an escape, which is what JSON has for it.
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
    """One line of JSON for every request, in order; `defaults` are the fields that a line doesn't give itself."""
    room = asyncio.Semaphore(concurrency)

    async def outcome(number: int, line: bytes) -> str:
        if number in kept:
            return kept[number]
        async with room:
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
        answer = await _patiently(client, {**defaults, **fields})
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


async def _patiently(client: AsyncClient, fields: dict[str, Any]) -> Answer:
    """Asks again, as long as the gateway has no room now."""
    # Refuses whatever is no field of a request, such as `timeout`, which `generate` would take.
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
    """A line of an earlier run; empty where it was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
