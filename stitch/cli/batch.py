"""`stitch batch`: a JSONL file of requests becomes a JSONL file of answers and errors, in order.

Lines end at `\\n` alone and are UTF-8. An answer names the digest of its request, so `--resume` keeps it for that
request alone, wherever its line is then. The output changes at the end of a run, also of an interrupted one.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stitch.cli.arguments import gateway_endpoint, request_fields
from stitch.cli.output import json_line
from stitch.client import Answer, AsyncClient
from stitch.client.messages import generate_request
from stitch.errors import Exhausted, InvalidRequest, StitchError, shown

# A full gateway is asked again after the time that it names, up to this many times.
MAX_ATTEMPTS = 20

_BYTE_ORDER_MARKS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)

# Opened again by their names, they would have a position of their own in the file to which a shell redirects them.
_OWN_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}

Record = dict[str, Any]
"""One line of the output: `line`, the request's `id` where it has one, and an answer or an `error`."""


class Line(NamedTuple):
    """A line of the input that isn't blank."""

    number: int
    content: bytes


def run(parsed: argparse.Namespace) -> int:
    """Answers every line; returns 1 where a line has an error."""
    file = Path("/dev/stdin" if parsed.file == "-" else parsed.file)
    target = output_target("/dev/stdout" if parsed.out == "-" else parsed.out, file, parsed.resume)
    lines, defaults = read_lines(file), request_fields(parsed)
    with Outcomes(target) as outcomes:
        kept: dict[int, Record] = {}
        if parsed.resume:
            kept, others = kept_answers(lines, outcomes.earlier_answers())
            outcomes.keep(kept, others)
            _tell(target.path, kept, others, changed_settings(lines, kept, defaults))
        failed = asyncio.run(_answer(lines, kept, outcomes, defaults, parsed))
    print(f"{len(lines) - failed} answered, {failed} failed: {parsed.out}", file=sys.stderr)
    return 1 if failed else 0


async def _answer(
    lines: Sequence[Line],
    kept: Mapping[int, Record],
    outcomes: Outcomes,
    defaults: Mapping[str, Any],
    parsed: argparse.Namespace,
) -> int:
    """Writes the outcome of every line; returns the number of errors."""
    failed = 0
    async with AsyncClient(*gateway_endpoint(parsed)) as client:
        with _progress() as progress:
            outcomes.begin(kept)
            task = progress.add_task("answering", total=len(lines))
            async for record in outcome_records(client, lines, kept, defaults, parsed.concurrency):
                outcomes.write(record)
                failed += "error" in record
                progress.advance(task)
    return failed


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _tell(out: Path, kept: Mapping[int, Record], others: Sequence[Record], changes: Mapping[str, int]) -> None:
    """Prints what is unusual about the answers of earlier runs."""
    if others:
        where = _beside(out, "old")
        print(
            f"{len(others)} of {len(kept) + len(others)} answers belong to no line and are in {where}", file=sys.stderr
        )
    for change, count in changes.items():
        print(f"{count} kept answers were made with {change}", file=sys.stderr)


def read_lines(file: Path) -> list[Line]:
    """The lines of the file that aren't blank, one request each, valid or not.

    A UTF-8 byte order mark is dropped, and a file with that of UTF-16 or UTF-32 is decoded; raises InvalidRequest where
    it can't be.
    """
    content = file.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            try:
                content = content.decode(encoding).encode()
            except ValueError as error:
                raise InvalidRequest(
                    "the input", str(file), f"its byte order mark is of {encoding}: {error}"
                ) from error
            break
    lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in content.split(b"\n"))
    return [Line(number, line) for number, line in enumerate(lines, start=1) if line]


def kept_answers(lines: Sequence[Line], earlier: Sequence[Record]) -> tuple[dict[int, Record], list[Record]]:
    """The earlier answers of these lines, by line number, and those that belong to none of them.

    An answer belongs to a line with its request's digest; one without a digest, to a line with its id.
    """
    waiting: defaultdict[str, deque[Record]] = defaultdict(deque)
    for record in earlier:
        key = record["request"] if "request" in record else f"id {json.dumps(record.get('id'))}"
        waiting[str(key)].append(record)
    kept = {}
    for number, line in lines:
        with contextlib.suppress(InvalidRequest):
            fields = _fields(line)
            keys = [digest(fields), *([f"id {json.dumps(fields['id'])}"] if fields.get("id") is not None else [])]
            found = next((waiting[key].popleft() for key in keys if waiting[key]), None)
            if found is not None:
                kept[number] = {"line": number, **found}
    return kept, [record for records in waiting.values() for record in records]


def digest(fields: Mapping[str, Any]) -> str:
    """Of a request's fields, the id among them, whatever their order and spacing; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def changed_settings(
    lines: Sequence[Line], kept: Mapping[int, Record], defaults: Mapping[str, Any]
) -> Mapping[str, int]:
    """How many kept answers were made with another value of a flag that their line leaves open, by the change."""
    changes: Counter[str] = Counter()
    for number, line in lines:
        if number in kept:
            fields, earlier = _fields(line), kept[number].get("settings", {})
            for name in sorted({*earlier, *defaults} - set(fields)):
                was, now = (_setting(settings.get(name)) for settings in (earlier, defaults))
                changes.update([f"{name} {was}, not {now}"] if was != now else [])
    return changes


def _setting(value: object) -> str:
    return "unset" if value is None else shown(value)


class Target(NamedTuple):
    """Where outcomes go: a plain file, after all symbolic links, or a pipe or device, to which they stream."""

    path: Path
    is_plain: bool


def output_target(out: str, file: Path, resume: bool) -> Target:
    """The target that `--out` names. Raises InvalidRequest where it can't be written without loss, or is `file`."""
    mode = os.stat(out).st_mode if os.path.exists(out) else None
    is_device = mode is not None and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode))
    # What a shell has opened is written on, not replaced.
    is_plain = not is_device and not os.path.abspath(out).startswith(("/dev/", "/proc/"))
    path = Path(os.path.realpath(out) if is_plain else out)
    if path.is_dir() or out.endswith("/"):
        raise InvalidRequest("--out", out, "it is a folder")
    if (mode is not None and not is_device and not stat.S_ISREG(mode)) or (is_plain and path.is_symlink()):
        raise InvalidRequest("--out", out, "it is no file, pipe or terminal")
    if not path.parent.is_dir():
        raise InvalidRequest("--out", out, f"the folder {path.parent} doesn't exist")
    if mode is not None and not os.access(path, os.W_OK):
        raise InvalidRequest("--out", out, "it can't be written")
    if resume and not is_plain:
        raise InvalidRequest("--resume", out, "only a plain file has answers to keep")
    for written in (path, _beside(path, "part"), _beside(path, "old")):
        if not stat.S_ISCHR(mode or 0) and written.exists() and file.exists() and written.samefile(file):
            raise InvalidRequest("--out", out, f"the input {file} would be overwritten")
    return Target(path, is_plain)


class Outcomes:
    """Writes outcomes in order to a draft, which becomes the output at the end or at an interruption.

    A run that is killed, or that can't write, leaves the output as it was, and its answers in the draft.
    """

    def __init__(self, target: Target) -> None:
        self._out, self._is_plain = target
        self._draft = _beside(self._out, "part") if self._is_plain else self._out
        self._kept: Mapping[int, Record] = {}
        self._written, self._begun, self._failed = 0, False, False
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Opens the draft without a change; raises InvalidRequest where another run has it."""
        if not self._is_plain:
            number = _OWN_STREAMS.get(str(self._out))
            self._file = self._out.open("ab") if number is None else os.fdopen(os.dup(number), "wb")
            return self
        self._file = self._draft.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InvalidRequest("--out", str(self._out), "another run is writing it") from error
        return self

    def earlier_answers(self) -> list[Record]:
        """The answers of earlier runs, without their line numbers; errors and incomplete lines are left out."""
        # A draft repeats what its run has kept from the output.
        found = _answers(self._out) | _answers(self._draft)
        return [json.loads(text) for text in found.elements()]

    def keep(self, kept: Mapping[int, Record], others: Sequence[Record]) -> None:
        """Saves what earlier runs have answered before their draft is overwritten, `others` in a file of their own."""
        if others:
            with _beside(self._out, "old").open("ab") as old:
                old.writelines(_encoded(record) for record in others)
        if others or self._draft.stat().st_size:
            fresh = _beside(self._out, "kept")
            fresh.write_bytes(b"".join(_encoded(kept[number]) for number in sorted(kept)))
            self._replace_output(fresh)

    def begin(self, kept: Mapping[int, Record]) -> None:
        """Empties the draft; `kept` are the answers that an interruption must not lose."""
        self._kept, self._begun = kept, True
        if self._is_plain and self._file is not None:
            self._file.truncate(0)

    def write(self, record: Record) -> None:
        """Writes the outcome of the input's next line."""
        if self._file is None or self._failed:
            return
        self._written = record["line"]
        try:
            self._file.write(_encoded(record))
            self._file.flush()
        except OSError as error:
            self._failed = True
            raise OSError(error.errno, error.strerror, str(self._draft)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun and self._is_plain:
            for number in sorted(number for number in self._kept if number > self._written):
                self.write(self._kept[number])
        if self._file is not None:
            # What could not be written is not written now either.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._is_plain and self._begun and not self._failed:
            self._replace_output(self._draft)
        elif self._is_plain and self._draft.stat().st_size == 0:
            self._draft.unlink()

    def _replace_output(self, fresh: Path) -> None:
        """Makes `fresh` the output, with the mode of the old one; a file of several names is written in place."""
        if self._out.exists():
            shutil.copymode(self._out, fresh)
            if self._out.stat().st_nlink > 1:
                shutil.copyfile(fresh, self._out)
                fresh.unlink()
                return
        fresh.replace(self._out)


def _answers(file: Path) -> Counter[str]:
    """How often each answer is in the file, as JSON without its line number."""
    found: Counter[str] = Counter()
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
        record = _record(line)
        if isinstance(record.pop("line", None), int) and "error" not in record:
            found[json.dumps(record)] += 1
    return found


def _record(line: bytes) -> Record:
    """The outcome in a line of an earlier run; empty where the line is incomplete."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _encoded(record: Record) -> bytes:
    # A lone surrogate in an id can't be encoded; JSON has an escape for it.
    return f"{json_line(record)}\n".encode(errors="backslashreplace")


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


async def outcome_records(
    client: AsyncClient,
    lines: Sequence[Line],
    kept: Mapping[int, Record],
    defaults: Mapping[str, Any],
    concurrency: int,
) -> AsyncGenerator[Record, None]:
    """The outcome of every line, in order; `defaults` holds for the fields that a line doesn't set."""
    slots = asyncio.Semaphore(concurrency)

    async def outcome(line: Line) -> Record:
        if line.number in kept:
            return kept[line.number]
        async with slots:
            return {"line": line.number, **await _outcome(client, line.content, defaults)}

    tasks = [asyncio.create_task(outcome(line)) for line in lines]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()


async def _outcome(client: AsyncClient, line: bytes, defaults: Mapping[str, Any]) -> Record:
    named: Record = {}
    try:
        fields = _fields(line)
        made_of = {"request": digest(fields), **({"settings": dict(defaults)} if defaults else {})}
        named = {"id": fields.pop("id")} if "id" in fields else {}
        answer = await _generate(client, {**defaults, **fields})
    except StitchError as error:
        return {**named, "error": {"code": error.code.name, "message": str(error)}}
    except grpc.RpcError as error:
        return {**named, "error": {"code": error.code().name, "message": error.details()}}
    return {**named, **made_of, **answer.as_json()}


def _fields(line: bytes) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", line.decode(errors="replace"), f"it is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("line", fields, 'it must be an object such as {"prompt": "…"}')
    return fields


async def _generate(client: AsyncClient, fields: Record) -> Answer:
    """One answer; repeats the request while the gateway is full."""
    # Refuses fields that no request has; `generate` itself would accept `timeout`.
    generate_request(fields)
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await client.generate(**fields)
        except Exhausted as full:
            await asyncio.sleep(full.retry_after_seconds)
    return await client.generate(**fields)
