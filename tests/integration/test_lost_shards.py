"""Shards that are killed or stopped during an answer, in a cluster of one bottom shard and two top replicas."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from stitch.client import Answer, Client, Delta
from stitch.errors import Unavailable
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.tiny_cluster import BOTTOM, TOP, write_tiny_cluster
from tests.support.waiting import becomes_true

TOPS = ("top-0", "top-1")
ANSWER_TOKENS = 400
FIELDS: dict[str, Any] = {
    "route": "weak",
    "max_tokens": ANSWER_TOKENS,
    "ignore_eos": True,
    "temperature": 0.7,
    "seed": 5,
}
RECOVERY_SECONDS = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), name="replicated", bottoms=[BOTTOM], tops=[TOP, TOP])
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(scope="module")
def expected_answer(cluster: Cluster) -> Answer:
    """The answer of the same request without a fault."""
    return cluster.generate("stitch", **FIELDS)


@pytest.fixture(autouse=True)
def restarted_processes(cluster: Cluster) -> Iterator[None]:
    """Restarts every ended process after each test."""
    yield
    for name in cluster.names:
        if not cluster.running(name):
            cluster.restart(name)


@pytest.fixture
def running_answer(cluster: Cluster, expected_answer: Answer) -> Iterator[RunningAnswer]:
    """An answer that is being generated."""
    with Client(cluster.gateway) as client:
        yield RunningAnswer(client)


class RunningAnswer:
    """An answer whose first text has arrived."""

    def __init__(self, client: Client) -> None:
        self._stream = client.stream("stitch", **FIELDS)
        self._events = iter(self._stream)
        while not isinstance(next(self._events), Delta):
            pass

    def answer(self) -> Answer:
        """Reads the stream to its end, and returns the answer."""
        for _ in self._events:
            pass
        return self._stream.answer


def busy_top_shards(cluster: Cluster) -> list[str]:
    """The top shards that hold a session."""
    return [name for name in TOPS if cluster.metric(name, "stitch_kv_cache_usage_ratio") > 0]


def is_idle(cluster: Cluster) -> bool:
    names = ("bottom-0", *TOPS)
    return all(cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0 for name in names if cluster.running(name))


def test_killed_shard_with_replica_leaves_text_unchanged(
    cluster: Cluster, expected_answer: Answer, running_answer: RunningAnswer
) -> None:
    before = cluster.metric(GATEWAY, "stitch_replays_total")
    (used,) = busy_top_shards(cluster)
    cluster.kill(used)
    answer = running_answer.answer()
    assert (answer.text, answer.token_ids) == (expected_answer.text, expected_answer.token_ids)
    assert cluster.metric(GATEWAY, "stitch_replays_total") == before + 1
    assert becomes_true(lambda: is_idle(cluster), RECOVERY_SECONDS)


def test_killed_shard_without_replica_reports_generated_tokens(
    cluster: Cluster, expected_answer: Answer, running_answer: RunningAnswer
) -> None:
    for name in TOPS:
        cluster.kill(name)
    with pytest.raises(Unavailable, match="no chain of route weak can continue") as caught:
        running_answer.answer()
    assert 0 < caught.value.generated_tokens < ANSWER_TOKENS
    assert f"after {caught.value.generated_tokens} tokens" in str(caught.value)
    assert becomes_true(lambda: is_idle(cluster), RECOVERY_SECONDS)
    with pytest.raises(Unavailable):
        cluster.generate("stitch", **FIELDS)
    cluster.restart("top-0")
    assert cluster.generate("stitch", **FIELDS).token_ids == expected_answer.token_ids


def test_gateway_serves_again_after_the_first_shard_restarts(
    cluster: Cluster, expected_answer: Answer, running_answer: RunningAnswer
) -> None:
    cluster.kill("bottom-0")
    with pytest.raises(Unavailable, match="no chain of route weak can continue"):
        running_answer.answer()
    assert becomes_true(lambda: is_idle(cluster), RECOVERY_SECONDS)
    cluster.restart("bottom-0")
    assert cluster.generate("stitch", **FIELDS).token_ids == expected_answer.token_ids


@pytest.mark.parametrize("name", ["bottom-0", GATEWAY])
def test_sigterm_finishes_running_answers(
    cluster: Cluster, expected_answer: Answer, running_answer: RunningAnswer, name: str
) -> None:
    cluster.signal(name, signal.SIGTERM)
    assert running_answer.answer().token_ids == expected_answer.token_ids
    assert cluster.wait_for_end(name) == 0


def test_sigterm_to_a_top_shard_finishes_running_answers(
    cluster: Cluster, expected_answer: Answer, running_answer: RunningAnswer
) -> None:
    (used,) = busy_top_shards(cluster)
    cluster.signal(used, signal.SIGTERM)
    assert running_answer.answer().token_ids == expected_answer.token_ids
    assert cluster.wait_for_end(used) == 0
