"""A next shard that is stopped, and continues later: its sessions go on elsewhere, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stitch.channels import open_channel
from stitch.sampling import Sampling
from stitch.v1 import shard_pb2, shard_pb2_grpc
from tests.support.exact_answers import ExactAnswers
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.running_streams import RunningStreams
from tests.support.tiny_cluster import BOTTOM, TOP, Layers, write_tiny_cluster
from tests.support.waiting import becomes_true

pytestmark = pytest.mark.slow

# The bound is 2 s and one prefill; the rest is for machines that compute other tests at the same time.
PAUSE_SECONDS = 4.0
STOPPED_SECONDS = 3.0
RELEASE_SECONDS = 20.0
HUNG_SECONDS = 120.0
STREAMS = 8
ANSWER_TOKENS = 500
REQUESTS: list[dict[str, Any]] = [
    {"prompt": f"the quick brown fox {number}", "route": "weak", "temperature": 0.7, "seed": number}
    for number in range(STREAMS)
]


@contextmanager
def cluster_of(folder: Path, tops: Sequence[Layers], num_micro_batches: int) -> Iterator[Cluster]:
    file = write_tiny_cluster(folder, bottoms=[BOTTOM], tops=tops, num_micro_batches=num_micro_batches)
    with running_cluster(file, folder / "run") as cluster:
        assert becomes_true(cluster.all_serving, RELEASE_SECONDS)
        yield cluster


def is_idle(cluster: Cluster) -> bool:
    shards = [name for name in cluster.names if name != GATEWAY]
    return all(cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0 for name in shards)


def stop_under_answers(cluster: Cluster, folder: Path, *replicas: str) -> None:
    """Stops the busiest of these shards under eight answers, for a while."""
    client = cluster.client_of(cluster.gateway)
    fields = [{**request, "max_tokens": ANSWER_TOKENS, "ignore_eos": True} for request in REQUESTS]
    answers = RunningStreams(client, fields)
    assert becomes_true(lambda: min(answers.tokens) > 10, HUNG_SECONDS)
    name = max(replicas, key=lambda one: cluster.metric(one, "stitch_sessions_running"))
    cluster.pause(name)
    time.sleep(STOPPED_SECONDS)
    cluster.resume(name)
    assert answers.ended(HUNG_SECONDS)
    assert all(one.finished for one in answers.streams), [one.error for one in answers.streams]
    print([round(one.longest_pause, 2) for one in answers.streams])
    assert max(one.longest_pause for one in answers.streams) < PAUSE_SECONDS
    exact = ExactAnswers(folder)
    for request, answer in zip(REQUESTS, answers.streams, strict=True):
        assert exact.continuation(token_ids=answer.token_ids, **request) == answer.token_ids
    assert becomes_true(lambda: is_idle(cluster), RELEASE_SECONDS)


async def generate(cluster: Cluster, top: str, count: int) -> list[int]:
    """Tokens of a session that the first shard is told to send to this top shard."""
    request = shard_pb2.ShardGenerateRequest(
        token_ids=[1, 2, 3], prompt_tokens=3, route="weak", chain=[top], sampling=Sampling(max_tokens=count).to_proto()
    )
    async with open_channel(cluster.address("bottom-0")) as channel:
        stub: shard_pb2_grpc.ShardAsyncStub = shard_pb2_grpc.ShardStub(channel)
        return [token.id async for response in stub.Generate(request) for token in response.tokens]


async def cancelled_requests(cluster: Cluster, top: str) -> None:
    """Four requests for a top shard that does not answer, each cancelled before the shard is suspect."""
    for _ in range(4):
        request = asyncio.create_task(generate(cluster, top, 4))
        await asyncio.sleep(0.1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


@pytest.mark.parametrize("num_micro_batches", [1, pytest.param(2, marks=pytest.mark.full)])
def test_stopped_top_with_replica_delays_nobody(tmp_path: Path, num_micro_batches: int) -> None:
    with cluster_of(tmp_path, [TOP, TOP], num_micro_batches) as cluster:
        stop_under_answers(cluster, tmp_path, "top-0", "top-1")
        assert "it is suspect" in cluster.log("bottom-0")
        assert becomes_true(lambda: cluster.metric("bottom-0", "stitch_suspects") == 0, RELEASE_SECONDS)
        # Both are linked now. Whoever else asks for the stopped one and leaves takes nobody's place.
        expected = asyncio.run(generate(cluster, "top-1", 20))
        assert asyncio.run(generate(cluster, "top-0", 20)) == expected
        cluster.pause("top-0")
        asyncio.run(cancelled_requests(cluster, "top-0"))
        started = time.monotonic()
        assert asyncio.run(generate(cluster, "top-1", 20)) == expected
        assert time.monotonic() - started < PAUSE_SECONDS
        cluster.resume("top-0")
        assert becomes_true(lambda: is_idle(cluster), RELEASE_SECONDS)


@pytest.mark.full
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_stopped_last_shard_is_found_by_the_middle_one(tmp_path: Path, num_micro_batches: int) -> None:
    with cluster_of(tmp_path, [(2, 3), (3, 4), (3, 4)], num_micro_batches) as cluster:
        stop_under_answers(cluster, tmp_path, "top-1", "top-2")
        assert "it is suspect" in cluster.log("top-0")
        assert "it is suspect" not in cluster.log("bottom-0")
