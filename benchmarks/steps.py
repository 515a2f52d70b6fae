"""What shards noted of their passes. Knows no figure."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """What a shard noted of one pass; seconds of the machine's monotonic clock, which is `time.perf_counter`'s."""

    started: float
    ended: float
    tokens: int
    sessions: int

    @property
    def milliseconds(self) -> float:
        return (self.ended - self.started) * 1e3


@dataclass(frozen=True, slots=True)
class StepLogs:
    """The notes of all shards that were started while this was open."""

    folder: Path

    def read(self) -> Mapping[str, Sequence[Step]]:
        """By the shard's name, in the order in which they were computed."""
        return {
            path.stem: [Step(**json.loads(line)) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.glob("*.jsonl"))
        }


@contextmanager
def step_logs() -> Iterator[StepLogs]:
    """Shards that are started inside of the block note their passes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STITCH_STEP_LOG"] = folder
        try:
            yield StepLogs(Path(folder))
        finally:
            del os.environ["STITCH_STEP_LOG"]
