"""Every family of a shard is there from the start, at zero and under the shard's name."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from stitch_server.metrics import Metrics

NAMES = [
    'stitch_batch_tokens_count{shard="top-0"}',
    'stitch_link_bytes_total{direction="sent"}',
    'stitch_link_bytes_total{direction="received"}',
    "stitch_event_loop_delay_seconds_count",
]


def page(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_zero_from_the_start(name: str) -> None:
    assert f"\n{name} 0.0\n" in page(Metrics("top-0"))


def test_what_is_counted_is_shown() -> None:
    metrics = Metrics("top-0")
    metrics.sent.inc(7)
    metrics.received.inc(5)
    metrics.batch_tokens.observe(32)
    said = page(metrics)
    assert 'stitch_link_bytes_total{direction="sent"} 7.0' in said
    assert 'stitch_link_bytes_total{direction="received"} 5.0' in said
    assert 'stitch_batch_tokens_bucket{le="32.0",shard="top-0"} 1.0' in said
    assert 'stitch_batch_tokens_bucket{le="16.0",shard="top-0"} 0.0' in said


def test_gauges_and_sums_are_read_when_somebody_asks() -> None:
    metrics, values = Metrics("top-0"), {"usage": 0.25, "busy": 3.0}
    metrics.read_gauge("stitch_usage", "The share in use.", lambda: values["usage"])
    metrics.read_counter("stitch_busy_seconds", "Time spent.", lambda: values["busy"])
    assert 'stitch_usage{shard="top-0"} 0.25' in page(metrics)
    assert 'stitch_busy_seconds_total{shard="top-0"} 3.0' in page(metrics)
    values.update(usage=0.5, busy=4.0)
    assert 'stitch_usage{shard="top-0"} 0.5' in page(metrics)
    assert 'stitch_busy_seconds_total{shard="top-0"} 4.0' in page(metrics)
    assert "# TYPE stitch_busy_seconds_total counter" in page(metrics)


def test_two_shards_of_one_process_share_nothing() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.sent.inc()
    assert second.registry.get_sample_value("stitch_link_bytes_total", {"direction": "sent"}) == 0
