"""Every metric of a shard is exposed at zero from the start, and every pass is a line of the step log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from stitch_server.engine.types import Batch, LayerRange, Segment
from stitch_server.metrics import Metrics, StepLog
from tests.support.engine_fakes import new_request

NAMES = [
    'stitch_batch_tokens_count{shard="top-0"}',
    'stitch_link_bytes_total{direction="sent"}',
    'stitch_link_bytes_total{direction="received"}',
    "stitch_event_loop_delay_seconds_count",
    "stitch_event_loop_tasks",
]


def page(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("name", NAMES)
def test_metric_is_exposed_at_zero_from_the_start(name: str) -> None:
    assert f"\n{name} 0.0\n" in page(Metrics("top-0"))


def test_counted_values_are_exposed() -> None:
    metrics = Metrics("top-0")
    metrics.link_bytes_sent.inc(7)
    metrics.link_bytes_received.inc(5)
    metrics.batch_tokens.observe(32)
    exposed = page(metrics)
    assert 'stitch_link_bytes_total{direction="sent"} 7.0' in exposed
    assert 'stitch_link_bytes_total{direction="received"} 5.0' in exposed
    assert 'stitch_batch_tokens_bucket{le="32.0",shard="top-0"} 1.0' in exposed
    assert 'stitch_batch_tokens_bucket{le="16.0",shard="top-0"} 0.0' in exposed


def test_read_metrics_have_the_value_at_the_scrape() -> None:
    metrics, values = Metrics("top-0"), {"usage": 0.25, "busy": 3.0}
    metrics.read_gauge("stitch_usage", "The share in use.", lambda: values["usage"])
    metrics.read_counter("stitch_busy_seconds", "Time spent.", lambda: values["busy"])
    assert 'stitch_usage{shard="top-0"} 0.25' in page(metrics)
    assert 'stitch_busy_seconds_total{shard="top-0"} 3.0' in page(metrics)
    values.update(usage=0.5, busy=4.0)
    assert 'stitch_usage{shard="top-0"} 0.5' in page(metrics)
    assert 'stitch_busy_seconds_total{shard="top-0"} 4.0' in page(metrics)
    assert "# TYPE stitch_busy_seconds_total counter" in page(metrics)


def test_two_shards_of_one_process_have_separate_registries() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.link_bytes_sent.inc()
    assert second.registry.get_sample_value("stitch_link_bytes_total", {"direction": "sent"}) == 0


def test_step_log_writes_a_line_for_every_pass(tmp_path: Path) -> None:
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


def test_step_log_appends_to_an_existing_file(tmp_path: Path) -> None:
    for _ in range(2):
        with StepLog(tmp_path, "top-0") as log:
            log(Batch(()), 0.0, 1.0)
    assert len((tmp_path / "top-0.jsonl").read_text().splitlines()) == 2
