"""Keys and values are read from the slots into which they were written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitch_server.kv_cache.store import KVStore, Span, slots_of

CPU = torch.device("cpu")
KV_HEADS, HEAD_DIM = 2, 3


def new_store(block_tokens: int = 4) -> KVStore:
    store = KVStore(5, 7, 3, KV_HEADS, HEAD_DIM, CPU, torch.float32, block_tokens)
    store.kv.zero_()
    return store


def drawn(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, KV_HEADS, HEAD_DIM), torch.randn(tokens, KV_HEADS, HEAD_DIM)


def test_gather_returns_written_keys_before_values() -> None:
    store, slots = new_store(), torch.tensor([9, 2, 4])
    key, value = drawn(3)
    store.write(6, slots, key, value)
    assert torch.equal(store.gather(6, slots), torch.cat([key, value], dim=1))
    assert torch.equal(store.gather(6, slots.flip(0)), torch.cat([key, value], dim=1).flip(0))


def test_write_leaves_other_slots_and_layers_unchanged() -> None:
    store = new_store()
    store.write(6, torch.tensor([3]), *drawn(1))
    written = (store.kv != 0).any(dim=3).any(dim=2)
    assert written.nonzero().tolist() == [[1, 3]]


def test_paged_views_have_a_dimension_for_blocks() -> None:
    store = new_store()
    key, value = drawn(1)
    store.write(5, torch.tensor([4 + 2]), key, value)
    keys, values = store.paged(5)
    assert keys.shape == values.shape == (3, 4, KV_HEADS, HEAD_DIM)
    assert torch.equal(keys[1, 2], key[0])
    assert torch.equal(values[1, 2], value[0])


@pytest.mark.parametrize(
    ("position", "length", "slots"), [(0, 3, [8, 9, 10]), (2, 3, [8, 9, 10, 11, 0]), (7, 1, [8, 9, 10, 11, 0, 1, 2, 3])]
)
def test_slots_of_a_span_cover_cached_and_new_tokens(position: int, length: int, slots: list[int]) -> None:
    assert slots_of(Span(position, length, [2, 0]), 4, CPU).tolist() == slots
