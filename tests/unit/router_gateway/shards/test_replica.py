"""Tests of a replica's state, by polls of a fake shard."""

from __future__ import annotations

import asyncio
import logging

import pytest

from stitch.cluster import ShardConfig
from tests.support.fake_shard import LAYERS, FakeShard
from tests.support.registries import registry_of


async def test_replica_with_another_tokenizer_does_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    other = FakeShard("top-0", "top")
    other.tokenizer = "words"
    async with registry_of(FakeShard("bottom-0", "bottom"), other) as (_, registry):
        await registry.refresh([registry.replicas["bottom-0"]])
        await registry.refresh()
        assert [replica.accepts_requests for replica in registry.replicas.values()] == [True, False]
    assert "its tokenizer is words, but that of bottom-0 is bytes" in caplog.text


async def test_replica_serves_after_its_first_answer() -> None:
    shard = FakeShard("bottom-0", "bottom")
    shard.free_kv_tokens = 77
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        assert not replica.serving
        await replica.poll()
        assert replica.serving
        assert replica.load.free_tokens == 77
        assert replica.identity is not None
        assert replica.identity.shard == "bottom-0"


async def test_replica_that_refuses_the_connection_is_gone_at_once() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_failed_polls=9) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        await shard.stop()
        await replica.poll()
        assert not replica.serving
        assert replica.identity is not None


async def test_silent_replica_is_gone_after_max_failed_polls() -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top"), max_failed_polls=2) as (_, registry):
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
    async with registry_of(shard, FakeShard("top-0", "top"), max_failed_polls=2) as (_, registry):
        replica = registry.replicas["bottom-0"]
        for _ in range(2):
            shard.answers_describe.clear()
            await replica.poll()
            shard.answers_describe.set()
            await replica.poll()
        assert replica.serving


async def test_replica_with_other_layers_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        monkeypatch.setitem(LAYERS, "bottom", (0, 3))
        await registry.refresh([registry.replicas["bottom-0"]])
        assert not registry.replicas["bottom-0"].accepts_requests
    assert "it holds bottom layers 0 to 3, but the cluster file says 0 to 4 of bottom" in caplog.text


async def test_draining_replica_serves_and_accepts_no_requests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shard = FakeShard("bottom-0", "bottom")
    async with registry_of(shard, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        await replica.poll()
        version = registry.version
        shard.draining = True
        await replica.poll()
        assert (replica.serving, replica.draining, replica.accepts_requests) == (True, True, False)
        assert registry.version > version
        assert "shard bottom-0 is draining" in caplog.text
        await shard.stop()
        await replica.poll()
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
