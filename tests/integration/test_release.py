"""An answer that is cancelled or expired frees its KV on every shard within a second."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from stitch.client import AsyncClient, Delta
from stitch.errors import Expired
from tests.support.processes import Cluster
from tests.support.waiting import becomes_true

# Takes seconds, so that it is still running when its client cancels.
LONG: dict[str, Any] = {"max_tokens": 1_500, "ignore_eos": True}
ROUTES = ("weak", "strong")
SHARDS = ("bottom-0", "top-0")
RELEASE_SECONDS = 1.0
NOTICE_SECONDS = 60.0


def usage(cluster: Cluster) -> list[float]:
    """The share of KV blocks that sessions hold, by shard."""
    return [cluster.metric(shard, "stitch_kv_cache_usage_ratio") for shard in SHARDS]


def cancelled(cluster: Cluster, cause: str) -> float:
    return cluster.metric("gateway", "stitch_cancelled_total", cause=cause)


@pytest.fixture(autouse=True)
def released(tiny_cluster: Cluster) -> Iterator[None]:
    """The cluster is idle before and after every test."""
    assert becomes_true(lambda: usage(tiny_cluster) == [0.0, 0.0], RELEASE_SECONDS)
    yield
    assert usage(tiny_cluster) == [0.0, 0.0]


def assert_released(cluster: Cluster, cause: str, before: float) -> None:
    """Asserts that all KV is free within a second after the gateway counts the cancellation."""
    assert becomes_true(lambda: cancelled(cluster, cause) > before, NOTICE_SECONDS)
    assert becomes_true(lambda: usage(cluster) == [0.0, 0.0], RELEASE_SECONDS)


@pytest.mark.parametrize("route", ROUTES)
def test_cancelled_answer_frees_its_kv(tiny_cluster: Cluster, route: str) -> None:
    before = cancelled(tiny_cluster, "client")
    stream = iter(tiny_cluster.client.stream("stitch", route=route, **LONG))
    while not isinstance(next(stream), Delta):
        pass
    assert min(usage(tiny_cluster)) > 0
    stream.close()  # type: ignore[attr-defined]
    assert_released(tiny_cluster, "client", before)


def test_answer_cancelled_before_first_token_frees_its_kv(tiny_cluster: Cluster) -> None:
    before = cancelled(tiny_cluster, "client")
    stream = iter(tiny_cluster.client.stream("é" * 900, route="strong", **LONG))
    assert not isinstance(next(stream), Delta)
    stream.close()  # type: ignore[attr-defined]
    assert_released(tiny_cluster, "client", before)


async def test_cancelled_asyncio_task_frees_its_kv(tiny_cluster: Cluster) -> None:
    before = cancelled(tiny_cluster, "client")
    async with AsyncClient(tiny_cluster.gateway) as client:
        tasks = [asyncio.create_task(client.generate("stitch", route=route, **LONG)) for route in ROUTES]
        assert await asyncio.to_thread(becomes_true, lambda: min(usage(tiny_cluster)) > 0, NOTICE_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(assert_released, tiny_cluster, "client", before + 1)


@pytest.mark.parametrize("route", ROUTES)
def test_expired_answer_frees_its_kv(tiny_cluster: Cluster, route: str) -> None:
    before = cancelled(tiny_cluster, "deadline")
    with pytest.raises(Expired):
        tiny_cluster.generate("stitch", route=route, timeout=1.0, **LONG)
    assert_released(tiny_cluster, "deadline", before)


def test_killed_client_frees_the_kv_of_its_answers(tiny_cluster: Cluster) -> None:
    before = cancelled(tiny_cluster, "client")
    command = [sys.executable, "-m", "stitch.cli.main", "ask", "stitch", "--gateway", tiny_cluster.gateway]
    flags = ["--max-tokens", str(LONG["max_tokens"]), "--ignore-eos", "--route"]
    clients = [subprocess.Popen([*command, *flags, route], stdout=subprocess.DEVNULL) for route in ROUTES]
    try:
        assert becomes_true(lambda: min(usage(tiny_cluster)) > 0, NOTICE_SECONDS)
    finally:
        for client in clients:
            client.kill()
            client.wait()
    assert_released(tiny_cluster, "client", before)
