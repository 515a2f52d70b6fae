"""A shard comes, goes, falls silent, or turns out to be another one."""

from __future__ import annotations

import pytest

from stitch.cluster import ShardConfig
from tests.support.fake_shard import LAYERS, FakeShard
from tests.support.fleets import fleet_of


async def test_a_shard_serves_once_it_has_answered() -> None:
    shard = FakeShard("bottom-0", "bottom")
    shard.free_kv_tokens = 77
    async with fleet_of(shard, FakeShard("top-0", "top")) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        assert not replica.serving
        await replica.poll()
        assert replica.serving
        assert replica.free_kv_tokens == 77
        assert replica.identity is not None
        assert replica.identity.shard == "bottom-0"


async def test_a_shard_that_refuses_the_connection_is_gone_at_once() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fleet_of(shard, FakeShard("top-0", "top"), silent_polls=9) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        await replica.poll()
        await shard.stop()
        await replica.poll()
        assert not replica.serving
        assert replica.identity is not None


async def test_a_silent_shard_is_gone_after_so_many_polls() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fleet_of(shard, FakeShard("top-0", "top"), silent_polls=2) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        await replica.poll()
        shard.talks.clear()
        await replica.poll()
        assert replica.serving
        await replica.poll()
        assert not replica.serving
        shard.talks.set()


async def test_one_silent_poll_is_forgotten_by_the_next_answer() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fleet_of(shard, FakeShard("top-0", "top"), silent_polls=2) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        for _ in range(2):
            shard.talks.clear()
            await replica.poll()
            shard.talks.set()
            await replica.poll()
        assert replica.serving


async def test_those_who_wait_are_told_when_it_goes_and_only_inside_of_their_block() -> None:
    shard = FakeShard("bottom-0", "bottom")
    told = []
    async with fleet_of(shard, FakeShard("top-0", "top")) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        await replica.poll()
        with replica.on_unavailable(lambda: told.append("too early")):
            pass
        with replica.on_unavailable(lambda: told.append("gone")):
            await shard.stop()
            await replica.poll()
            await replica.poll()
    assert told == ["gone"]


async def test_a_shard_with_other_layers_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with fleet_of(shard, FakeShard("top-0", "top")) as (_, fleet):
        monkeypatch.setitem(LAYERS, "bottom", (0, 3))
        await fleet.refresh(["bottom-0"])
        assert not fleet.replicas["bottom-0"].serving
    assert "it holds bottom layers 0 to 3, but the cluster file says 0 to 4 of bottom" in caplog.text


async def test_room_is_counted_until_the_shard_says_what_is_free() -> None:
    shard = FakeShard("bottom-0", "bottom")
    shard.free_kv_tokens = 100
    async with fleet_of(shard, FakeShard("top-0", "top")) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        await replica.poll()
        replica.reserve(30)
        assert replica.free_kv_tokens == 70
        await replica.poll()
        assert replica.free_kv_tokens == 100


def test_the_fake_stands_where_it_listens() -> None:
    assert FakeShard("top-0", "top").place == ShardConfig(
        name="top-0", role="top", layers=LAYERS["top"], address="127.0.0.1:0"
    )
