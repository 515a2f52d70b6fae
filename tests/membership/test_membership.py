"""Replicas that come and go in the cluster file and in DNS while streams run, in a cluster of real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stitch import channels
from stitch.local.cluster import keep_port
from tests.support.processes import GATEWAY, Cluster, running_cluster
from tests.support.resolved_program import ADDRESSES
from tests.support.running_streams import RunningStreams
from tests.support.tiny_cluster import TOP, write_tiny_cluster
from tests.support.waiting import becomes_true

STREAMS = 16
# Of an answer that outlasts a change of the source, and of others.
LONG, SHORT = 200, 60
PATIENCE_SECONDS = 30.0
START_SECONDS = 120.0
ENTRY, HOST, FOUND = "more", "more.test", "more-127-0-0-2"


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that has the addresses of hosts."""
    file = tmp_path_factory.mktemp("dns") / "addresses.json"
    file.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESSES, str(file))
        yield file


@pytest.fixture(scope="module")
def cluster(addresses: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), name="members", tops=[TOP, TOP])
    run = tmp_path_factory.mktemp("run")
    with running_cluster(file, run, runner="tests.support.resolved_program") as running:
        assert becomes_true(running.all_serving, PATIENCE_SECONDS)
        yield running


@pytest.fixture(scope="module", autouse=True)
def found_shard(cluster: Cluster) -> Iterator[str]:
    """The address of a replica for which the cluster file has a name that has no address yet.

    It starts while the first tests run.
    """
    with ExitStack() as ports:
        port, metrics_port = keep_port(ports, "127.0.0.2"), keep_port(ports)
        named = {"name": ENTRY, "address": f"dns:{HOST}:{port}", "metrics_port": metrics_port}
        cluster.write_shards([*cluster.shards, {**cluster.shards[-1], **named}])
        cluster.start(ENTRY, listen=f"127.0.0.2:{port}")
        yield f"127.0.0.2:{port}"


def start_streams(cluster: Cluster, tokens: int = SHORT) -> RunningStreams:
    """Sixteen streams, each with a prompt of its own."""
    requests: list[dict[str, Any]] = [
        {"prompt": f"{number} streams", "route": "weak", "max_tokens": tokens, "ignore_eos": True, "seed": number}
        for number in range(STREAMS)
    ]
    streams = RunningStreams(cluster.client, requests)
    assert becomes_true(lambda: streams.have_more_than([0] * STREAMS), PATIENCE_SECONDS)
    return streams


def assert_none_failed(cluster: Cluster, *all_streams: RunningStreams) -> None:
    """Every stream has all of its tokens, and none was continued on another chain."""
    for streams in all_streams:
        assert streams.ended(PATIENCE_SECONDS)
        assert [stream.error for stream in streams.streams] == [None] * STREAMS
        assert streams.tokens == [stream.fields["max_tokens"] for stream in streams.streams]
    assert cluster.metric(GATEWAY, "stitch_replays_total") == 0


def sessions(cluster: Cluster, shard: str) -> int:
    return int(cluster.metric(shard, "stitch_sessions_running"))


def passes(cluster: Cluster, shard: str) -> int:
    """How many batches the shard has computed."""
    return int(cluster.metric(shard, "stitch_batch_tokens_count"))


def states(cluster: Cluster) -> dict[str, bool]:
    return {shard.name: shard.serving for shard in cluster.client.describe().shards}


def changes(cluster: Cluster, kind: str) -> int:
    return int(cluster.metric(GATEWAY, "stitch_membership_changes_total", kind=kind))


def test_replica_removed_from_the_file_ends_its_own_streams_and_one_added_takes_new_ones(cluster: Cluster) -> None:
    shards, before = cluster.shards, start_streams(cluster, LONG)
    assert sessions(cluster, "top-1") > 0
    cluster.write_shards([shard for shard in shards if shard["name"] != "top-1"])
    assert becomes_true(lambda: not states(cluster).get("top-1"), PATIENCE_SECONDS)
    assert changes(cluster, "removed") == 1
    while_away = start_streams(cluster)
    assert_none_failed(cluster, before, while_away)
    assert sessions(cluster, "top-0") == sessions(cluster, "top-1") == 0
    computed = passes(cluster, "top-1")
    answer = cluster.generate("nobody else", route="weak", max_tokens=4)
    assert answer.token_ids
    assert passes(cluster, "top-1") == computed

    running = start_streams(cluster)
    cluster.write_shards(shards)
    assert becomes_true(lambda: states(cluster).get("top-1", False), PATIENCE_SECONDS)
    after = start_streams(cluster)
    assert sessions(cluster, "top-1") > 0
    assert_none_failed(cluster, running, after)
    assert passes(cluster, "top-1") > computed


def test_second_turn_goes_to_the_replica_that_has_computed_the_first(cluster: Cluster) -> None:
    def reused() -> dict[str, int]:
        metric = "stitch_prefix_tokens_reused_total"
        return {name: int(cluster.metric(name, metric)) for name in ("bottom-0", "top-0", "top-1")}

    # While one runs, the other top shard gets the first turn of each conversation; idle, it would get no second one.
    first_turns = [f"{number} talks at some length, so that its prompt fills several blocks of KV" for number in "ab"]
    with cluster.client_of(cluster.gateway) as client:
        streams = RunningStreams(
            client, [{"prompt": one, "route": "weak", "max_tokens": 100, "ignore_eos": True} for one in first_turns]
        )
        assert streams.ended(PATIENCE_SECONDS)
    before = reused()
    for prompt in first_turns:
        cluster.generate(f"{prompt}, and goes on", route="weak", max_tokens=2)
    after = reused()
    assert after["bottom-0"] > before["bottom-0"]
    assert after["top-0"] > before["top-0"]
    assert after["top-1"] > before["top-1"]


def test_address_that_dns_gets_is_a_replica_and_one_that_it_loses_ends_its_own_streams(
    cluster: Cluster, addresses: Path, found_shard: str
) -> None:
    assert becomes_true(lambda: channels.serves(found_shard), START_SECONDS)
    before = start_streams(cluster)
    addresses.write_text(json.dumps({HOST: ["127.0.0.2"]}))
    assert becomes_true(lambda: states(cluster).get(FOUND, False), PATIENCE_SECONDS)
    running = start_streams(cluster, LONG)
    assert sessions(cluster, ENTRY) > 0
    # Nobody is at that address.
    addresses.write_text(json.dumps({HOST: ["127.0.0.3"]}))
    assert becomes_true(lambda: not states(cluster).get(FOUND), PATIENCE_SECONDS)
    while_away = start_streams(cluster)
    assert_none_failed(cluster, before, running, while_away)
    assert sessions(cluster, ENTRY) == 0
    # It leaves once its last session has ended.
    assert becomes_true(lambda: FOUND not in states(cluster), PATIENCE_SECONDS)


@pytest.mark.parametrize("broken", ["", '{"shards": [', "other models"])
def test_file_that_can_not_be_taken_changes_nothing(cluster: Cluster, broken: str) -> None:
    content, refused, before = cluster.file.read_text(), changes(cluster, "refused"), states(cluster)
    if broken == "other models":
        fields = json.loads(content)
        fields["models"]["bottom"]["id"], fields["shards"] = "another", fields["shards"][:2]
        broken = json.dumps(fields)
    cluster.file.write_text(broken)
    try:
        assert becomes_true(lambda: changes(cluster, "refused") > refused, PATIENCE_SECONDS)
        assert states(cluster) == before
        assert cluster.generate("still there", route="weak", max_tokens=4).token_ids
    finally:
        cluster.file.write_text(content)
    assert f"the shards from file {cluster.file.name} stay as they are" in cluster.log(GATEWAY)
