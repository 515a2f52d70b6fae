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
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
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
from stitch.client.until_room import until_room
from stitch.errors import InvalidRequest, StitchError, shown

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
        kept, others = kept_answers(lines, outcomes.earlier_answers()) if parsed.resume else ({}, [])
        _tell(target.path, kept, others, changed_settings(lines, kept, defaults))
        remaining = [line for line in lines if line.number not in kept]
        outcomes.begin([line.number for line in lines], kept, others)
        failed = asyncio.run(_answer(remaining, outcomes, defaults, parsed))
    print(f"{len(lines) - failed} answered, {failed} failed: {parsed.out}", file=sys.stderr)
    return 1 if failed else 0


async def _answer(
    lines: Sequence[Line], outcomes: Outcomes, defaults: Mapping[str, Any], parsed: argparse.Namespace
) -> int:
    """Adds the outcome of every line; returns the number of errors."""
    failed = 0
    async with AsyncClient(*gateway_endpoint(parsed)) as client:
        found = outcome_records(client, lines, defaults, parsed.concurrency)
        with _progress() as progress:
            task = progress.add_task("answering", total=len(lines))
            async with contextlib.aclosing(found):
                async for record in found:
                    outcomes.add(record)
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
            f"{len(others)} of {len(kept) + len(others)} answers belong to no line and go to {where}", file=sys.stderr
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
    for written in (path, *(_beside(path, suffix) for suffix in ("part", "new", "old"))):
        if not stat.S_ISCHR(mode or 0) and written.exists() and file.exists() and written.samefile(file):
            raise InvalidRequest("--out", out, f"the input {file} would be overwritten")
    return Target(path, is_plain)


class Outcomes:
    """Collects outcomes as they come: a draft holds them until the end or an interruption, then the output, in order.

    A run that is killed, or that can't write, leaves the output as it was, and its answers in the draft. A pipe or a
    device has no draft: it gets every outcome as soon as those before it are there.
    """

    def __init__(self, target: Target) -> None:
        self._out, self._is_plain = target
        self._draft = _beside(self._out, "part") if self._is_plain else self._out
        self._done: dict[int, Record] = {}
        self._others: Sequence[Record] = ()
        # The numbers of the lines whose outcomes have not been written to a pipe or a device yet.
        self._next: deque[int] = deque()
        self._begun, self._failed = False, False
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
        # A draft that outlived the end of its run repeats the output.
        found = _answers(self._out) | _answers(self._draft)
        return [json.loads(text) for text in found.elements()]

    def begin(self, numbers: Iterable[int], kept: Mapping[int, Record], others: Sequence[Record]) -> None:
        """Starts a run over these lines. `kept` are their earlier answers; `others` go to a file of their own.

        Empties the draft where neither are given: then nobody has asked for what is in it.
        """
        self._done, self._others, self._next, self._begun = dict(kept), others, deque(numbers), True
        if self._is_plain and self._file is not None:
            if not kept and not others:
                self._file.truncate(0)
            # A killed run may have left an incomplete line.
            self._write(b"\n" if self._draft.stat().st_size else b"")

    def add(self, record: Record) -> None:
        """Adds the outcome of a line; lines may come in any order."""
        self._done[record["line"]] = record
        if self._is_plain:
            self._write(_encoded(record))
        while not self._is_plain and self._next and self._next[0] in self._done:
            self._write(_encoded(self._done.pop(self._next.popleft())))

    def _write(self, content: bytes) -> None:
        if self._file is not None:
            try:
                with _naming(self._draft):
                    self._file.write(content)
                    self._file.flush()
            except OSError:
                self._failed = True
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_plain and self._begun and not self._failed:
                self._finish()
            elif self._is_plain and self._draft.stat().st_size == 0:
                self._draft.unlink()
        finally:
            # Closing tries once more to write what could not be written.
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._file.close()

    def _finish(self) -> None:
        """Makes all outcomes the output, in order, with the mode of the old one."""
        fresh = _beside(self._out, "new")
        with _naming(fresh), fresh.open("wb") as file:
            file.writelines(_encoded(self._done[number]) for number in sorted(self._done))
        if self._others:
            old = _beside(self._out, "old")
            with _naming(old), old.open("ab") as file:
                file.writelines(_encoded(record) for record in self._others)
        if self._out.exists():
            shutil.copymode(self._out, fresh)
        if self._out.exists() and self._out.stat().st_nlink > 1:
            # The file keeps its other names.
            with _naming(self._out):
                shutil.copyfile(fresh, self._out)
            fresh.unlink()
        else:
            fresh.replace(self._out)
        self._draft.unlink()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of writing, which has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
    client: AsyncClient, lines: Sequence[Line], defaults: Mapping[str, Any], concurrency: int
) -> AsyncGenerator[Record, None]:
    """The outcome of every line as soon as it is there; `defaults` holds for the fields that a line doesn't set."""
    slots = asyncio.Semaphore(concurrency)

    async def outcome(line: Line) -> Record:
        async with slots:
            return {"line": line.number, **await _outcome(client, line.content, defaults)}

    tasks = [asyncio.create_task(outcome(line)) for line in lines]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for one in tasks:
            one.cancel()


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
    return await until_room(lambda: client.generate(**fields))
