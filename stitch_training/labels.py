"""Labelled prompts, as JSON lines, plain or gzip. Knows no model of them.

Each line has a `prompt`, perhaps a `task`, and the quality of the answers in one of three forms:
{"strong": q, "weak": q}, {"scores": {name: q}} or {"routes": {name: q}}, the last being what `label` writes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stitch.errors import InvalidRequest

Qualities: TypeAlias = NDArray[np.float64]

PAIR = ("weak", "strong")
_NO_WORD = re.compile(r"\W+")


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """The rows of one file in which all routes are labelled."""

    name: str
    routes: tuple[str, ...]
    prompts: list[str]
    # `name/task`, or the name alone where a row has no task. Training learns to guess it; judging never sees it.
    topics: list[str]
    # [rows, routes], higher is better.
    qualities: Qualities
    # SHA-256 of the file's text.
    fingerprint: str
    # Rows that leave out one of the routes.
    skipped: int

    def __len__(self) -> int:
        return len(self.prompts)


def read_labels(path: Path, routes: Sequence[str] = PAIR, renamed: Mapping[str, str] | None = None) -> LabelledSet:
    """Reads a file; `renamed` maps a name in the file to the route that it stands for.

    Raises InvalidRequest, with the number of the line, where one is no label, and where no row labels all routes.
    """
    prompts, topics, qualities, skipped = [], [], [], 0
    name = path.name.split(".")[0]
    for number, row in read_json_lines(path):
        found = _qualities(row, f"{path.name}:{number}")
        found = {(renamed or {}).get(key, key): value for key, value in found.items()}
        if not all(route in found for route in routes):
            skipped += 1
            continue
        prompts.append(row["prompt"])
        topics.append(f"{name}/{row['task']}" if row.get("task") else name)
        qualities.append([found[route] for route in routes])
    if not prompts:
        raise InvalidRequest("data", str(path), f"no row labels all of {', '.join(routes)}")
    fingerprint = hashlib.sha256(_read(path).encode()).hexdigest()
    return LabelledSet(name, tuple(routes), prompts, topics, np.array(qualities, np.float64), fingerprint, skipped)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, labelled or not. Raises InvalidRequest where a line is off or there is none."""
    prompts = [row["prompt"] for _, row in read_json_lines(path)]
    if not prompts:
        raise InvalidRequest("data", str(path), "it must have at least one prompt")
    return prompts


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of every line and its object, which has a `prompt`; a `question` stands for one.

    Raises InvalidRequest, with the number of the line, where one is off.
    """
    # Not splitlines(), which would also break at characters that JSON strings may contain.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield number, _row(line, f"{path.name}:{number}")


def same_prompt(prompt: str) -> str:
    """Equal for prompts that differ in case, spaces and signs only; such rows must not sit on both sides of a fold."""
    return _NO_WORD.sub(" ", prompt.lower()).strip()


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidRequest("data", str(path), f"it can't be read: {error}") from error


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(place, line, f"it must be JSON: {error}") from error
    prompt = row.get("prompt", row.get("question")) if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise InvalidRequest(f"{place}.prompt", row, "a row must have one, a string")
    return {**row, "prompt": prompt}


def _qualities(row: Mapping[str, Any], place: str) -> dict[str, float]:
    for field in ("routes", "scores"):
        if field in row:
            return _numbers(row[field], f"{place}.{field}")
    if all(field in row for field in PAIR):
        return _numbers({field: row[field] for field in PAIR}, place)
    raise InvalidRequest(place, sorted(row), "a row must have routes, scores, or strong and weak")


def _numbers(values: object, place: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise InvalidRequest(place, values, "it must map names to numbers")
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequest(f"{place}.{name}", value, "it must be a finite number")
    return {name: float(value) for name, value in values.items()}
