"""How much KV is planned from how much memory."""

from __future__ import annotations

import pytest
import torch

from stitch_server import kv_sizing as planning
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.kv_sizing import MOST_CONTEXTS, PROCESSOR_SHARE, free_bytes, kv_bytes_per_token, kv_tokens

CPU = torch.device("cpu")
FREE = 1 << 30


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda device: FREE)


@pytest.mark.parametrize(("configured", "tokens"), [(16, 16), (100, 96), (8192, 8192), (1, 16)])
def test_what_is_configured_counts_in_whole_blocks(configured: int, tokens: int) -> None:
    assert kv_tokens(configured, 1 << 60, 2048, CPU) == tokens


def test_without_a_word_it_takes_its_share_of_what_is_free() -> None:
    planned = kv_tokens(0, 1024, 1 << 30, CPU)
    assert planned == int(FREE * PROCESSOR_SHARE) // 1024
    assert planned % BLOCK_TOKENS == 0


def test_a_gpu_gives_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv_tokens(0, 1024, 1 << 30, torch.device("cuda", 0)) > 3 * kv_tokens(0, 1024, 1 << 30, CPU)


def test_weights_that_are_still_to_come_are_left_room_for() -> None:
    assert kv_tokens(0, 1024, 1 << 30, CPU, FREE // 2) == pytest.approx(kv_tokens(0, 1024, 1 << 30, CPU) / 2, abs=16)
    assert kv_tokens(0, 1024, 1 << 30, CPU, 2 * FREE) == BLOCK_TOKENS


def test_nobody_needs_more_than_some_full_contexts() -> None:
    assert kv_tokens(0, 1, 100, CPU) == MOST_CONTEXTS * 100


def test_there_is_always_a_block() -> None:
    assert kv_tokens(0, 1 << 60, 2048, CPU) == BLOCK_TOKENS


@pytest.mark.parametrize(("configured", "tokens"), [(1000, 768), (100, 256)])
def test_blocks_may_be_larger(configured: int, tokens: int) -> None:
    assert kv_tokens(configured, 1 << 60, 2048, CPU, block_tokens=256) == tokens


def test_a_token_takes_keys_and_values_of_every_layer() -> None:
    store = KVStore(5, 8, blocks=4, kv_heads=2, head_dim=8, device=CPU, dtype=torch.bfloat16)
    per_token = kv_bytes_per_token(3, 2, 8, torch.bfloat16)
    assert per_token * 4 * BLOCK_TOKENS == store.kv.nbytes


def test_memory_that_is_free_is_more_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert free_bytes(CPU) > 0
