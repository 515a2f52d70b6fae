"""The tokenizer comes from whichever first shard answers."""

from __future__ import annotations

import pytest

from router_gateway.tokenization import source as vocabulary_source
from router_gateway.tokenization.source import VocabularySource, fetch_files, first_shards
from stitch.errors import Incompatible, Unavailable
from tests.support.byte_tokenizer import tokenizer_files, tokens
from tests.support.fake_shard import FakeShard
from tests.support.fleets import fleet_of


async def test_all_files_arrive_whole() -> None:
    async with fleet_of(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as (_, fleet):
        assert await fetch_files(fleet.replicas["bottom-0"]) == tokenizer_files()


async def test_a_shard_that_is_away_is_passed_over() -> None:
    away = FakeShard("bottom-0", "bottom")
    async with fleet_of(away, FakeShard("bottom-1", "bottom"), FakeShard("top-0", "top")) as (cluster, fleet):
        await away.stop()
        source = VocabularySource([fleet.replicas[name] for name in first_shards(cluster)])
        with pytest.raises(Unavailable, match="bottom-0, bottom-1"):
            source.require()
        vocabulary = await source.load(pause_seconds=0.0)
        assert source.require() is vocabulary
        assert vocabulary.encode("hello") == tokens("hello")


async def test_files_that_can_t_be_used_are_asked_for_elsewhere() -> None:
    broken = FakeShard("bottom-0", "bottom")
    broken.files = {"tokenizer.json": b"{}"}
    async with fleet_of(broken, FakeShard("bottom-1", "bottom"), FakeShard("top-0", "top")) as (cluster, fleet):
        source = VocabularySource([fleet.replicas[name] for name in first_shards(cluster)])
        assert (await source.load(pause_seconds=0.0)).end_tokens == (2, 0)


async def test_no_shard_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = FakeShard("bottom-0", "bottom")
    async with fleet_of(greedy, FakeShard("top-0", "top")) as (_, fleet):
        replica = fleet.replicas["bottom-0"]
        monkeypatch.setattr(vocabulary_source, "MAX_BYTES", 1_999)
        with pytest.raises(Incompatible, match="2,000 bytes"):
            await fetch_files(replica)
        greedy.files = {"weights.bin": b"x"}
        with pytest.raises(Incompatible, match=r"weights\.bin"):
            await fetch_files(replica)
