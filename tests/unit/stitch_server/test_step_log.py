"""A line a step, as it is computed. Knows no shard."""

from __future__ import annotations

import json
from pathlib import Path

from stitch_server.engine.types import Batch, LayerRange, Segment
from stitch_server.step_log import StepLog
from tests.support.engine_fakes import new_request


def test_every_step_is_a_line_at_once(tmp_path: Path) -> None:
    lengths = (3, 1)
    segments = tuple(
        Segment(new_request(), LayerRange(0, 1), 0, length, wants_token=True, blocks=[]) for length in lengths
    )
    with StepLog(tmp_path / "steps", "top-0") as log:
        log(Batch(segments), 1.5, 2.0)
        log(Batch(segments[:1]), 2.5, 3.0)
        lines = (tmp_path / "steps" / "top-0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"started": 1.5, "ended": 2.0, "tokens": 4, "sessions": 2},
        {"started": 2.5, "ended": 3.0, "tokens": 3, "sessions": 1},
    ]


def test_a_second_run_is_appended(tmp_path: Path) -> None:
    for _ in range(2):
        with StepLog(tmp_path, "top-0") as log:
            log(Batch(()), 0.0, 1.0)
    assert len((tmp_path / "top-0.jsonl").read_text().splitlines()) == 2
