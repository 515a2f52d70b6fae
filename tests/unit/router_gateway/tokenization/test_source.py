"""Tests of fetching the tokenizer from the first shard that sends a valid one."""

from __future__ import annotations

import asyncio

import pytest

from router_gateway.tokenization import source as vocabulary_source
from router_gateway.tokenization.source import VocabularySource, fetch_files
from stitch.errors import Incompatible, Unavailable
from stitch.process import background_tasks
from tests.support.byte_tokenizer import tokenizer_files, tokens
from tests.support.fake_shard import FakeShard
from tests.support.registries import registry_of
from tests.support.waiting import eventually


async def test_fetch_files_returns_every_file_complete() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        assert await fetch_files(registry.replicas["bottom-0"]) == tokenizer_files()


async def test_load_skips_a_shard_that_is_gone() -> None:
    away = FakeShard("bottom-0", "bottom")
    async with registry_of(away, FakeShard("bottom-1", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        await away.stop()
        source = VocabularySource(registry)
        with pytest.raises(Unavailable, match="bottom-0, bottom-1"):
            source.require()
        vocabulary = await source.load(pause_seconds=0.0)
        assert source.require() is vocabulary
        assert vocabulary.encode("hello") == tokens("hello")


async def test_load_skips_a_shard_with_invalid_files() -> None:
    broken = FakeShard("bottom-0", "bottom")
    broken.files = {"tokenizer.json": b"{}"}
    async with registry_of(broken, FakeShard("bottom-1", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        source = VocabularySource(registry)
        assert (await source.load(pause_seconds=0.0)).end_tokens == (2, 0)


async def test_invalid_files_are_named_to_clients_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = FakeShard("bottom-0", "bottom")
    broken.files = tokenizer_files() | {"generation_config.json": b'{"eos_token_id": -1}'}
    async with registry_of(broken, FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        source = VocabularySource(registry)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.load(pause_seconds=0.01), 0.3)
        with pytest.raises(Unavailable, match=r"bottom-0: generation_config\.json: eos_token_id is -1, but"):
            source.require()
    assert sum("eos_token_id" in record.message for record in caplog.records) == 1


async def test_load_ends_when_it_is_cancelled_while_the_shards_change() -> None:
    async with registry_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        source = VocabularySource(registry)
        for turns in range(6):
            loading = asyncio.create_task(source.load(pause_seconds=60.0))
            await asyncio.sleep(0.01)
            registry.report_change()
            # Turns of the event loop between the change and the cancellation.
            for _ in range(turns):
                await asyncio.sleep(0)
            loading.cancel()
            await asyncio.wait({loading}, timeout=5)
            assert loading.cancelled()


async def test_fetch_files_limits_names_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = FakeShard("bottom-0", "bottom")
    async with registry_of(greedy, FakeShard("top-0", "top")) as (_, registry):
        replica = registry.replicas["bottom-0"]
        monkeypatch.setattr(vocabulary_source, "MAX_FILES_BYTES", 1_999)
        with pytest.raises(Incompatible, match="2,000 bytes"):
            await fetch_files(replica)
        greedy.files = {"weights.bin": b"x"}
        with pytest.raises(Incompatible, match=r"weights\.bin"):
            await fetch_files(replica)


async def test_tokenizer_that_the_shards_change_is_loaded_again(caplog: pytest.LogCaptureFixture) -> None:
    bottom, top = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")
    async with registry_of(bottom, top) as (_, registry):
        await registry.refresh()
        source = VocabularySource(registry)
        async with background_tasks(source.follow(pause_seconds=0.01)):
            await eventually(lambda: source.is_current)
            before = source.require()
            bottom.tokenizer = top.tokenizer = "other"
            await registry.refresh()
            with pytest.raises(Unavailable, match="the tokenizer that the shards have changed to"):
                source.require()
            await eventually(lambda: source.is_current)
            assert source.require() is not before
    assert "the shards have changed their tokenizer: loaded that of bottom-0" in caplog.text


async def test_tokenizer_of_a_shard_that_differs_from_the_others_is_not_loaded() -> None:
    other = FakeShard("bottom-0", "bottom")
    other.tokenizer = "other"
    other.files = {"tokenizer.json": b"{}"}
    async with registry_of(other, FakeShard("bottom-1", "bottom"), FakeShard("top-0", "top")) as (_, registry):
        await registry.refresh()
        source = VocabularySource(registry)
        await source.load(pause_seconds=0.0)
        assert source.is_current
