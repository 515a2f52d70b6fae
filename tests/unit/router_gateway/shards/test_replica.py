"""Tests of a replica's state, by polls of a fake shard, and of the compatibility check."""

from __future__ import annotations

import asyncio
import logging

import pytest

from router_gateway.shards.replica import CompatibilityCheck
from stitch.cluster import ShardConfig
from stitch.v1.inference_pb2 import Model, RouteDescription
from stitch.v1.shard_pb2 import ShardIdentity
from tests.support.fake_shard import LAYERS, FakeShard
from tests.support.registries import registry_of

FIRST = ShardIdentity(
    tokenizer="abc",
    bottom=Model(revision="b1"),
    top=Model(revision="t1"),
    routes=[RouteDescription(name="weak", stitch="s1")],
    probe="p1",
)


@pytest.mark.parametrize(
    ("second", "mismatch"),
    [
        (ShardIdentity(tokenizer="xyz"), "its tokenizer is xyz, but the other shards have abc"),
        (ShardIdentity(bottom=Model(revision="b2")), "its bottom model is b2, but the other shards have b1"),
        (ShardIdentity(probe="p2"), "its probe is p2, but the other shards have p1"),
        (ShardIdentity(top=Model(revision="t2")), "its top model is t2, but the other shards have t1"),
        (
            ShardIdentity(routes=[RouteDescription(name="weak", stitch="s2")]),
            "its stitch of route weak is s2, but the other shards have s1",
        ),
    ],
)
def test_mismatch_names_both_sides(second: ShardIdentity, mismatch: str) -> None:
    check = CompatibilityCheck()
    assert check.mismatch(FIRST) is None
    assert check.mismatch(second) == mismatch


def test_empty_facts_are_no_mismatch() -> None:
    check = CompatibilityCheck()
    assert check.mismatch(ShardIdentity()) is None
    assert check.mismatch(FIRST) is None
    assert check.mismatch(ShardIdentity(tokenizer="abc")) is None


async def test_replica_with_another_tokenizer_does_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    other = FakeShard("top-0", "top")
    other.tokenizer = "words"
    async with registry_of(FakeShard("bottom-0", "bottom"), other) as (_, registry):
        await registry.refresh(["bottom-0"])
        await registry.refresh()
        assert [replica.serving for replica in registry.replicas.values()] == [True, False]
    assert "its tokenizer is words, but the other shards have bytes" in caplog.text


async def test_replica_serves_after_its_first_answer() -> None:
    shard = FakeShard("bottom-0", "bottom")
    shard.free_kv_tokens = 77
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        assert not replica.serving
        await replica.poll()
        assert replica.serving
        assert replica.free_kv_tokens == 77
        assert replica.identity is not None
        assert replica.identity.shard == "bottom-0"


async def test_replica_that_refuses_the_connection_is_gone_at_once() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_timeouts=9) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        await shard.stop()
        await replica.poll()
        assert not replica.serving
        assert replica.identity is not None


async def test_silent_replica_is_gone_after_max_timeouts() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_timeouts=2) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        shard.answers_describe.clear()
        await replica.poll()
        assert replica.serving
        await replica.poll()
        assert not replica.serving
        shard.answers_describe.set()


async def test_answer_resets_the_count_of_timeouts() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_timeouts=2) as (_, registry):
        replica = registry.replicas["bottom-0"]
        for _ in range(2):
            shard.answers_describe.clear()
            await replica.poll()
            shard.answers_describe.set()
            await replica.poll()
        assert replica.serving


async def test_on_unavailable_calls_back_once_within_its_block() -> None:
    shard = FakeShard("bottom-0", "bottom")
    told = []
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        with replica.on_unavailable(lambda: told.append("too early")):
            pass
        with replica.on_unavailable(lambda: told.append("gone")):
            await shard.stop()
            await replica.poll()
            await replica.poll()
    assert told == ["gone"]


async def test_replica_with_other_layers_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        monkeypatch.setitem(LAYERS, "bottom", (0, 3))
        await registry.refresh(["bottom-0"])
        assert not registry.replicas["bottom-0"].serving
    assert "it holds bottom layers 0 to 3, but the cluster file says 0 to 4 of bottom" in caplog.text


async def test_reserved_kv_counts_until_the_next_poll() -> None:
    shard = FakeShard("bottom-0", "bottom")
    shard.free_kv_tokens = 100
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        replica.reserve(30)
        assert replica.free_kv_tokens == 70
        await replica.poll()
        assert replica.free_kv_tokens == 100


async def test_draining_replica_serves_and_accepts_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shard = FakeShard("bottom-0", "bottom")
    calls = []
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        version = registry.version
        with replica.on_unavailable(lambda: calls.append("gone")):
            shard.draining = True
            await replica.poll()
            assert (replica.serving, replica.draining, replica.accepts_requests) == (True, True, False)
            assert registry.version > version
            assert calls == []
            assert "shard bottom-0 is draining" in caplog.text
            await shard.stop()
            await replica.poll()
            assert calls == ["gone"]
            assert (replica.serving, replica.accepts_requests) == (False, False)


async def test_replica_accepts_requests_again_after_its_restart() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        shard.draining = True
        await replica.poll()
        await shard.stop()
        await replica.poll()
        shard.draining = False
        await shard.start()
        async with asyncio.timeout(20):
            while not replica.serving:
                await replica.poll()
        assert replica.accepts_requests


def test_fake_shard_config_has_its_address() -> None:
    assert FakeShard("top-0", "top").config == ShardConfig(
        name="top-0", role="top", layers=LAYERS["top"], address="127.0.0.1:0"
    )
