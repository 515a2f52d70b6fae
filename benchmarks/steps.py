"""The step logs of shards: one record per forward pass."""

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
    """One forward pass of a shard; times are seconds of the monotonic clock, which `time.perf_counter` reads, too."""

    started: float
    ended: float
    tokens: int
    sessions: int

    @property
    def milliseconds(self) -> float:
        return (self.ended - self.started) * 1e3


@dataclass(frozen=True, slots=True)
class StepLogs:
    """The step logs of all shards that were started inside the block of `step_logs`."""

    folder: Path

    def read(self) -> Mapping[str, Sequence[Step]]:
        """The passes by the shard's name, in the order of their computation."""
        return {
            path.stem: [Step(**json.loads(line)) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.glob("*.jsonl"))
        }


@contextmanager
def step_logs() -> Iterator[StepLogs]:
    """Makes shards that are started inside the block log their passes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STITCH_STEP_LOG"] = folder
        try:
            yield StepLogs(Path(folder))
        finally:
            del os.environ["STITCH_STEP_LOG"]
