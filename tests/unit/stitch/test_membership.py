"""The shards of a cluster file that changes, and of names whose addresses do."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from stitch.cluster import ClusterConfig, ShardConfig, load_cluster
from stitch.errors import InvalidRequest
from stitch.membership import Membership, check_addresses

BOTTOM = {"name": "bottom-0", "role": "bottom", "layers": [0, 4], "address": "127.0.0.1:7001"}
TOP = {"name": "top-0", "role": "top", "layers": [4, 8], "address": "127.0.0.1:7002"}
SECOND = {**TOP, "name": "top-1", "address": "127.0.0.1:7003"}
BY_DNS = {**TOP, "name": "more", "address": "dns:more.test:7004"}
FIELDS: dict[str, Any] = {
    "name": "pair",
    "models": {"bottom": {"id": "m", "source": "m"}, "top": {"id": "m", "source": "m"}},
    "routes": [{"name": "strong", "bottom_layers": 4, "top_from": 4}],
    "gateway": {"address": "127.0.0.1:7000"},
}


class Source:
    """A cluster file and a resolver that a test changes."""

    def __init__(self, folder: Path, *shards: dict[str, Any]) -> None:
        self.file = folder / "pair.json"
        self.addresses: dict[str, Collection[str]] = {}
        self.changes: list[str] = []
        self.taken: list[list[str]] = []
        self.write(*shards)
        self.membership = Membership(load_cluster(str(self.file)), self.resolve, self.changes.append)
        self.membership.on_change.append(lambda cluster: self.taken.append([one.name for one in cluster.members]))

    def write(self, *shards: dict[str, Any], **changed: Any) -> None:
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({**FIELDS, **changed, "shards": shards}))
        draft.replace(self.file)

    async def resolve(self, host: str) -> Collection[str]:
        if host not in self.addresses:
            raise OSError(f"no such host: {host}")
        return self.addresses[host]

    @property
    def names(self) -> list[str]:
        return [shard.name for shard in self.membership.cluster.members]

    def stage(self, index: int) -> list[str]:
        cluster = self.membership.cluster
        return [shard.name for shard in cluster.stages(cluster.route("strong"))[index]]


async def test_shards_of_a_changed_file_are_taken(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    source.write(BOTTOM, TOP, SECOND)
    await source.membership.refresh()
    source.write(BOTTOM, SECOND)
    await source.membership.refresh()
    assert source.taken == [["bottom-0", "top-0", "top-1"], ["bottom-0", "top-1"]]
    assert source.changes == ["added", "removed"]
    assert source.membership.last_change == "removed top-0"
    assert source.membership.source == "file pair.json"


async def test_unchanged_file_changes_nothing(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    await source.membership.refresh()
    source.write(BOTTOM, TOP)
    await source.membership.refresh()
    assert source.taken == []


async def test_another_address_is_another_shard(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    source.write(BOTTOM, {**TOP, "address": "127.0.0.1:7009"})
    await source.membership.refresh()
    assert source.changes == ["added", "removed"]
    assert source.membership.last_change == "added top-0; removed top-0"


@pytest.mark.parametrize(
    ("shards", "changed", "reason"),
    [
        ((BOTTOM,), {}, "route strong passes top layer 4, which no shard holds"),
        ((BOTTOM, TOP, {**SECOND, "layers": [4, 6]}), {}, "must be equal, of replicas, or disjoint"),
        ((BOTTOM, {**TOP, "layers": [4, 6]}), {}, "route strong has"),
        ((BOTTOM, TOP, {**SECOND, "name": "top-0"}), {}, "two shards have one name"),
        ((BOTTOM, TOP, {**SECOND, "address": "127.0.0.1:0"}), {}, "it needs a host and a port"),
        ((BOTTOM, TOP, {**SECOND, "address": "127.0.0.1"}), {}, "it needs a host and a port"),
        ((BOTTOM, TOP, SECOND), {"gateway": {"address": "127.0.0.1:7100"}}, "gateway"),
        ((BOTTOM, TOP, SECOND), {"models": {"bottom": {"id": "m", "source": "n"}, "top": TOP}}, "models"),
    ],
)
async def test_file_that_can_not_be_taken_is_logged_once_and_changes_nothing(
    tmp_path: Path,
    shards: tuple[dict[str, Any], ...],
    changed: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    for _ in range(2):
        source.write(*shards, **changed)
        await source.membership.refresh()
    assert (source.names, source.taken) == (["bottom-0", "top-0"], [])
    [problem] = source.membership.problems.values()
    assert reason in problem
    assert [record.message for record in caplog.records] == [
        f"the shards from file pair.json stay as they are: {problem}"
    ]
    assert source.changes == ["refused"]
    source.write(BOTTOM, TOP, SECOND)
    await source.membership.refresh()
    assert source.names == ["bottom-0", "top-0", "top-1"]
    assert source.membership.problems == {}


@pytest.mark.parametrize("content", [None, "", '{"name": "pair", "sha'])
async def test_file_that_is_gone_or_half_written_changes_nothing(tmp_path: Path, content: str | None) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    await source.membership.refresh()
    source.file.unlink()
    if content is not None:
        source.file.write_text(content)
    await source.membership.refresh()
    assert source.names == ["bottom-0", "top-0"]
    assert source.changes == ["refused"]


async def test_file_of_the_same_date_and_size_is_read_where_it_is_another_one(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, TOP)
    await source.membership.refresh()
    status = source.file.stat()
    source.write(BOTTOM, {**TOP, "name": "top-9"})
    os.utime(source.file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.file.stat().st_size == status.st_size
    await source.membership.refresh()
    assert source.names == ["bottom-0", "top-9"]


async def test_every_address_of_a_name_is_a_replica_of_its_entry(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, TOP, BY_DNS)
    source.addresses["more.test"] = ["10.0.0.8", "fd00::7"]
    await source.membership.refresh()
    assert source.stage(1) == ["top-0", "more-10-0-0-8", "more-fd00--7"]
    found = source.membership.cluster.found
    assert [shard.address for shard in found] == ["10.0.0.8:7004", "[fd00::7]:7004"]
    assert {shard.certified_name for shard in found} == {"more"}
    assert source.membership.source == "file pair.json, DNS more.test"
    source.addresses["more.test"] = ["10.0.0.8"]
    await source.membership.refresh()
    assert source.stage(1) == ["top-0", "more-10-0-0-8"]


async def test_stage_whose_name_has_no_address_yet_is_empty(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, BY_DNS)
    await source.membership.refresh()
    assert (source.stage(0), source.stage(1)) == (["bottom-0"], [])


@pytest.mark.parametrize("answer", [None, []])
async def test_name_that_loses_its_addresses_keeps_its_replicas(
    tmp_path: Path, answer: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(tmp_path, BOTTOM, BY_DNS)
    source.addresses["more.test"] = ["10.0.0.8"]
    await source.membership.refresh()
    del source.addresses["more.test"]
    if answer is not None:
        source.addresses["more.test"] = answer
    for _ in range(2):
        await source.membership.refresh()
    assert source.stage(1) == ["more-10-0-0-8"]
    assert len(caplog.records) == 1
    assert "the shards from DNS more.test stay as they are" in caplog.text


async def test_readings_at_the_same_time_are_one(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, BY_DNS)
    asked: list[str] = []

    async def resolve(host: str) -> Collection[str]:
        asked.append(host)
        return ["10.0.0.8"]

    membership = Membership(source.membership.cluster, resolve)
    await asyncio.gather(*(membership.refresh() for _ in range(20)))
    # The first caller's, and one that begins after the others have called.
    assert 1 <= len(asked) <= 2


async def test_names_resolved_a_moment_ago_are_not_resolved_again(tmp_path: Path) -> None:
    source = Source(tmp_path, BOTTOM, BY_DNS)
    source.addresses["more.test"] = ["10.0.0.8"]
    await source.membership.refresh(resolve_seconds=60.0)
    source.addresses["more.test"] = ["10.0.0.9"]
    await source.membership.refresh(resolve_seconds=60.0)
    assert source.stage(1) == ["more-10-0-0-8"]


def test_entry_with_a_name_leaves_room_for_the_addresses_in_names() -> None:
    with pytest.raises(ValueError, match="at most 23 characters"):
        ShardConfig.model_validate({**BY_DNS, "name": "x" * 24})


def test_found_shards_come_from_no_file(tmp_path: Path) -> None:
    file = tmp_path / "pair.json"
    found = {**SECOND, "entry": "top"}
    file.write_text(json.dumps({**FIELDS, "shards": [BOTTOM, TOP], "found": [found], "file": "other"}))
    assert load_cluster(str(file)).members == ClusterConfig.model_validate({**FIELDS, "shards": [BOTTOM, TOP]}).members
    file.write_text(json.dumps({**FIELDS, "shards": [BOTTOM, TOP, found]}))
    with pytest.raises(InvalidRequest, match="entry"):
        load_cluster(str(file))


def test_entry_with_a_name_needs_a_port() -> None:
    cluster = ClusterConfig.model_validate({**FIELDS, "shards": [BOTTOM, {**BY_DNS, "address": "dns:more.test"}]})
    with pytest.raises(InvalidRequest, match="it needs a host and a port"):
        check_addresses(cluster)
