"""A shard dies or stops in the middle of an answer. One pair on one bottom and two equal top shards."""

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
def undisturbed(cluster: Cluster) -> Answer:
    """The answer without a fault."""
    return cluster.generate("stitch", **FIELDS)


@pytest.fixture(autouse=True)
def repaired(cluster: Cluster) -> Iterator[None]:
    """Every process runs again after each test."""
    yield
    for name in cluster.names:
        if not cluster.running(name):
            cluster.restart(name)


@pytest.fixture
def listening(cluster: Cluster, undisturbed: Answer) -> Iterator[Listening]:
    """A client in the middle of an answer."""
    with Client(cluster.gateway) as client:
        yield Listening(client)


class Listening:
    """An answer of which the first text has come."""

    def __init__(self, client: Client) -> None:
        self._stream = client.stream("stitch", **FIELDS)
        self._events = iter(self._stream)
        while not isinstance(next(self._events), Delta):
            pass

    def answer(self) -> Answer:
        """Reads the rest."""
        for _ in self._events:
            pass
        return self._stream.answer


def busy(cluster: Cluster) -> list[str]:
    """The top shards that hold a session."""
    return [name for name in TOPS if cluster.metric(name, "stitch_kv_cache_usage_ratio") > 0]


def idle(cluster: Cluster) -> bool:
    names = ("bottom-0", *TOPS)
    return all(cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0 for name in names if cluster.running(name))


def test_with_a_replica_the_text_is_the_same(cluster: Cluster, undisturbed: Answer, listening: Listening) -> None:
    before = cluster.metric(GATEWAY, "stitch_replays_total")
    (used,) = busy(cluster)
    cluster.kill(used)
    answer = listening.answer()
    assert (answer.text, answer.token_ids) == (undisturbed.text, undisturbed.token_ids)
    assert cluster.metric(GATEWAY, "stitch_replays_total") == before + 1
    assert becomes_true(lambda: idle(cluster), RECOVERY_SECONDS)


def test_without_a_replica_the_client_hears_how_far_it_came(
    cluster: Cluster, undisturbed: Answer, listening: Listening
) -> None:
    for name in TOPS:
        cluster.kill(name)
    with pytest.raises(Unavailable, match="no chain of route weak can continue") as caught:
        listening.answer()
    assert 0 < caught.value.generated_tokens < ANSWER_TOKENS
    assert f"after {caught.value.generated_tokens} tokens" in str(caught.value)
    assert becomes_true(lambda: idle(cluster), RECOVERY_SECONDS)
    with pytest.raises(Unavailable):
        cluster.generate("stitch", **FIELDS)
    cluster.restart("top-0")
    assert cluster.generate("stitch", **FIELDS).token_ids == undisturbed.token_ids


def test_the_gateway_recovers_when_the_first_shard_returns(
    cluster: Cluster, undisturbed: Answer, listening: Listening
) -> None:
    cluster.kill("bottom-0")
    with pytest.raises(Unavailable, match="no chain of route weak can continue"):
        listening.answer()
    assert becomes_true(lambda: idle(cluster), RECOVERY_SECONDS)
    cluster.restart("bottom-0")
    assert cluster.generate("stitch", **FIELDS).token_ids == undisturbed.token_ids


@pytest.mark.parametrize("name", ["bottom-0", GATEWAY])
def test_sigterm_lets_running_answers_finish(
    cluster: Cluster, undisturbed: Answer, listening: Listening, name: str
) -> None:
    cluster.signal(name, signal.SIGTERM)
    assert listening.answer().token_ids == undisturbed.token_ids
    assert cluster.wait_for_end(name) == 0


def test_sigterm_to_a_top_shard_disturbs_no_answer(cluster: Cluster, undisturbed: Answer, listening: Listening) -> None:
    (used,) = busy(cluster)
    cluster.signal(used, signal.SIGTERM)
    assert listening.answer().token_ids == undisturbed.token_ids
    assert cluster.wait_for_end(used) == 0
