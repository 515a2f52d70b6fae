"""A line for every step that a shard computes, to see where a pipeline stalls. Knows no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from stitch_server.engine.types import Batch

# Called with a batch, and the seconds of `time.perf_counter` when it was begun and done.
Observer = Callable[[Batch, float, float], None]


class StepLog:
    """Appends JSON lines to `FOLDER/SHARD.jsonl`. Its clock is the machine's, so files of neighbours fit together."""

    def __init__(self, folder: Path, shard: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{shard}.jsonl").open("a")

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __call__(self, batch: Batch, started: float, ended: float) -> None:
        """One line: both times in seconds, how many tokens, and of how many sessions."""
        line = {"started": started, "ended": ended, "tokens": batch.num_tokens, "sessions": len(batch.segments)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
