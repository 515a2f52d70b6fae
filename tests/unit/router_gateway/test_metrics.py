"""Tests of the metrics: every family is exported at zero, and every label is bounded."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from router_gateway.metrics import PROMPT_BUCKETS, Metrics, prompt_bucket
from router_gateway.routing.router import REASON_KINDS
from stitch import buckets

NAMES = [
    'stitch_time_to_first_token_seconds_count{route="strong"}',
    'stitch_time_to_first_token_by_prompt_seconds_count{prompt_bucket="le64",route="weak"}',
    'stitch_inter_token_latency_seconds_count{route="weak"}',
    'stitch_request_duration_seconds_count{outcome="exhausted",route="none"}',
    'stitch_ttft_stage_seconds_count{stage="bottom_prefill"}',
    'stitch_prompt_tokens_count{route="weak"}',
    'stitch_generated_tokens_total{route="weak"}',
    'stitch_routed_total{reason="fallback",route="strong"}',
    "stitch_route_score_count",
    "stitch_requests_running",
    "stitch_requests_waiting",
    'stitch_replays_total{cause="unreachable"}',
    'stitch_cancelled_total{cause="client"}',
    "stitch_event_loop_delay_seconds_count",
    "stitch_event_loop_tasks",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_child_is_zero_from_the_start(name: str) -> None:
    page = generate_latest(Metrics(["weak", "strong"], REASON_KINDS).registry).decode()
    assert f"\n{name} 0.0\n" in page


def test_two_gateways_have_separate_counts() -> None:
    first, second = (Metrics(["weak"], REASON_KINDS) for _ in range(2))
    first.replays.labels(cause="cut").inc()
    assert second.registry.get_sample_value("stitch_replays_total", {"cause": "cut"}) == 0


@pytest.mark.parametrize(
    ("tokens", "label"), [(1, "le64"), (64, "le64"), (65, "le128"), (32_768, "le32768"), (32_769, "over")]
)
def test_prompt_bucket_is_the_smallest_that_fits(tokens: int, label: str) -> None:
    assert prompt_bucket(tokens) == label
    assert label in PROMPT_BUCKETS


def test_buckets_reach_from_a_millisecond_to_minutes() -> None:
    lists = {name: value for name, value in vars(buckets).items() if name.isupper()}
    assert all(list(bounds) == sorted(set(bounds)) for bounds in lists.values())
    assert buckets.TIME_TO_FIRST_TOKEN[0] == 0.001
    assert buckets.TIME_TO_FIRST_TOKEN[-1] >= 300
