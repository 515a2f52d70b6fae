"""A shard drains under 16 streams: its own sessions finish there, and new ones go to its replica."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from stitch.client import Client
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.tiny_cluster import BOTTOM, TOP, write_tiny_cluster
from tests.support.waiting import becomes_true

STREAMS = 16
ANSWER_TOKENS = 100
START_SECONDS = 60.0
# The limit of `--drain-seconds`; a shard whose sessions finish exits much earlier.
DRAIN_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(
        tmp_path_factory.mktemp("pair"), name="draining", bottoms=[BOTTOM, BOTTOM], tops=[TOP, TOP]
    )
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


def fields(stream: int) -> dict[str, Any]:
    """The request of one stream; every stream has its own seed."""
    route = ("weak", "strong")[stream % 2]
    return {"route": route, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0.7, "seed": stream}


class Streams:
    """Clients that each repeat one request until they are stopped."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopping = threading.Event()
        self.expected = [cluster.generate("stitch", **fields(stream)).token_ids for stream in range(STREAMS)]
        self.answers: list[list[tuple[int, ...]]] = [[] for _ in range(STREAMS)]

    def repeat_request(self, stream: int) -> None:
        """Raises the client's errors, so that an interrupted answer fails the test."""
        with Client(self._cluster.gateway) as client:
            while not self._stopping.is_set():
                self.answers[stream].append(tuple(client.generate("stitch", **fields(stream)).token_ids))

    def stop(self) -> None:
        self._stopping.set()


def running_sessions_until_exit(cluster: Cluster, name: str) -> list[int]:
    """Samples of the number of sessions with KV blocks on a shard, from its drain until its process has ended."""
    assert becomes_true(lambda: not cluster.serves(name), START_SECONDS)
    found = []
    while cluster.running(name):
        try:
            found.append(int(cluster.metric(name, "stitch_sessions_running")))
        except OSError:
            break
    return found


@pytest.mark.parametrize("name", ["top-0", "bottom-0"])
def test_draining_shard_finishes_its_sessions_and_gets_no_new_ones(cluster: Cluster, name: str) -> None:
    streams = Streams(cluster)
    replays = cluster.metric(GATEWAY, "stitch_replays_total")
    with ThreadPoolExecutor(STREAMS) as threads:
        clients = [threads.submit(streams.repeat_request, stream) for stream in range(STREAMS)]
        try:
            running = lambda: cluster.metric(name, "stitch_sessions_running") >= STREAMS // 4  # noqa: E731
            assert becomes_true(running, START_SECONDS)
            cluster.signal(name, signal.SIGTERM)
            running_sessions = running_sessions_until_exit(cluster, name)
            assert cluster.wait_for_end(name, DRAIN_SECONDS / 2) == 0
        finally:
            streams.stop()
        for done in clients:
            done.result()
    # A session may get its blocks after the signal that it came before: at most one of each stream.
    began = sum(max(0, later - earlier) for earlier, later in pairwise([0, *running_sessions]))
    assert began <= STREAMS
    for expected, answers in zip(streams.expected, streams.answers, strict=True):
        assert set(answers) == {tuple(expected)}
    assert cluster.metric(GATEWAY, "stitch_replays_total") == replays
    cluster.restart(name)
