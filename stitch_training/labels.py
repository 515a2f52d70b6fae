"""Reads labelled prompts from JSON lines, plain or gzip, and splits them into folds.

Each line has a `prompt`, optionally a `task`, and the quality of the answers in one of three forms:
{"strong": q, "weak": q}, {"scores": {name: q}} or {"routes": {name: q}}. `stitch-train label` writes the last one.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch.errors import InvalidRequest
from stitch_training.recovery import Float64Array

PAIR = ("weak", "strong")
_NO_WORD = re.compile(r"\W+")


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """The rows of one file that label every route."""

    name: str
    routes: tuple[str, ...]
    prompts: list[str]
    # `name/task`, or `name` where a row has no task. A target in training, never an input of a route decision.
    topics: list[str]
    # [rows, routes], higher is better.
    qualities: Float64Array
    # SHA-256 of the file's text.
    fingerprint: str
    # Number of rows that leave out a route.
    skipped: int

    def __len__(self) -> int:
        return len(self.prompts)


def read_labels(path: Path, routes: Sequence[str] = PAIR, renamed: Mapping[str, str] | None = None) -> LabelledSet:
    """Reads a file; `renamed` maps names in the file to routes.

    Raises InvalidRequest, with the line's number, where a line is not a label, and where no row labels all routes.
    """
    prompts, topics, qualities, skipped = [], [], [], 0
    name = path.name.split(".")[0]
    for number, row in read_json_lines(path):
        by_name = _qualities(row, f"{path.name}:{number}")
        by_route = {(renamed or {}).get(key, key): value for key, value in by_name.items()}
        if not all(route in by_route for route in routes):
            skipped += 1
            continue
        prompts.append(row["prompt"])
        topics.append(f"{name}/{row['task']}" if row.get("task") else name)
        qualities.append([by_route[route] for route in routes])
    if not prompts:
        raise InvalidRequest("data", str(path), f"no row labels all of {', '.join(routes)}")
    fingerprint = hashlib.sha256(_read(path).encode()).hexdigest()
    return LabelledSet(name, tuple(routes), prompts, topics, np.array(qualities, np.float64), fingerprint, skipped)


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a file, labelled or not. Raises InvalidRequest where a line is invalid or there is none."""
    prompts = [row["prompt"] for _, row in read_json_lines(path)]
    if not prompts:
        raise InvalidRequest("data", str(path), "it must have at least one prompt")
    return prompts


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields every line's number and object; `prompt` is filled in from `question` where it is missing.

    Raises InvalidRequest, with the line's number, where a line is invalid.
    """
    # splitlines() would also break at line separators within JSON strings.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield number, _row(line, f"{path.name}:{number}")


def prompt_key(prompt: str) -> str:
    """Returns a key that is equal for prompts that differ in case, spaces and signs only; they share a fold."""
    return _NO_WORD.sub(" ", prompt.lower()).strip()


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidRequest("data", str(path), f"it can't be read: {error}") from error


def _row(line: str, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(location, line, f"it must be JSON: {error}") from error
    prompt = row.get("prompt", row.get("question")) if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise InvalidRequest(f"{location}.prompt", row, "a row must have one, a string")
    return {**row, "prompt": prompt}


def _qualities(row: Mapping[str, Any], location: str) -> dict[str, float]:
    for field in ("routes", "scores"):
        if field in row:
            return _finite_numbers(row[field], f"{location}.{field}")
    if all(field in row for field in PAIR):
        return _finite_numbers({field: row[field] for field in PAIR}, location)
    raise InvalidRequest(location, sorted(row), "a row must have routes, scores, or strong and weak")


def _finite_numbers(values: object, location: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise InvalidRequest(location, values, "it must map names to numbers")
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRequest(f"{location}.{name}", value, "it must be a finite number")
    return {name: float(value) for name, value in values.items()}


def folds(keys: Sequence[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Returns the fold [rows] of every row, 0 … count - 1, drawn from the seed; rows with equal keys share a fold."""
    group_of = {key: group for group, key in enumerate(dict.fromkeys(keys))}
    fold_of_group = np.empty(len(group_of), np.int64)
    fold_of_group[np.random.default_rng(seed).permutation(len(group_of))] = np.arange(len(group_of)) % count
    return fold_of_group[[group_of[key] for key in keys]]
