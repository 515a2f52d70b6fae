"""A cluster of real processes whose first shard decides routes with a probe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import BOTTOM, TOP, write_tiny_cluster
from tests.support.tiny_probe import with_tiny_probe

PROMPTS = ["stitch", "a quick brown fox", "0 1 2 3 4 5 6 7 8 9", "layers of a larger model", "?", "über", "def f(x):"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("probe")
    file = with_tiny_probe(write_tiny_cluster(folder, bottoms=[BOTTOM, BOTTOM], tops=[TOP]))
    with running_cluster(file, folder / "run") as cluster:
        yield cluster


def test_probe_route_gives_the_same_answer_as_the_named_route(cluster: Cluster) -> None:
    routes = set()
    for prompt in PROMPTS:
        decided = cluster.generate(prompt, max_tokens=6, ignore_eos=True)
        named = cluster.generate(prompt, route=decided.route, max_tokens=6, ignore_eos=True)
        assert decided.token_ids == named.token_ids
        assert decided.reason.startswith("probe ")
        routes.add(decided.route)
    counts = [cluster.metric("gateway", "stitch_routed_total", route=route, reason="probe") for route in routes]
    assert sum(counts) == len(PROMPTS)


def test_route_query_equals_the_decision_of_the_answer(cluster: Cluster) -> None:
    for prompt in PROMPTS[:3]:
        answer = cluster.generate(prompt, max_tokens=1)
        query = cluster.client.route(prompt)
        assert (query.route, query.reason) == (answer.route, answer.reason)


def test_killed_first_shard_with_replica_leaves_answer_unchanged(cluster: Cluster) -> None:
    prompt = PROMPTS[1]
    wanted = cluster.generate(prompt, max_tokens=8, ignore_eos=True)
    cluster.kill("bottom-0")
    assert cluster.generate(prompt, max_tokens=8, ignore_eos=True).token_ids == wanted.token_ids
    cluster.restart("bottom-0")


def test_shard_does_not_start_with_probe_for_another_cut(tmp_path: Path) -> None:
    file = with_tiny_probe(write_tiny_cluster(tmp_path))
    fields = json.loads(file.read_text())
    # Both routes leave after layer 4 now.
    fields["routes"] = [route for route in fields["routes"] if route["name"] == "strong"]
    file.write_text(json.dumps(fields))
    with (
        pytest.raises(Exception, match="the probe is made for the earliest cut after layer 3, not for 4"),
        running_cluster(file, tmp_path / "run"),
    ):
        pass
