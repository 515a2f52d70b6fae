"""Attention over gathered blocks is PyTorch's attention over one tensor."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stitch_server.kv_cache import store
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, blocks_for
from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore, causal_mask

KV_HEADS, HEAD_DIM, BLOCKS = 2, 8, 24
LAYER = 5
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, None], autouse=True)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loops attend on so many threads; without a number PyTorch does."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or 1)
    if request.param is None:
        monkeypatch.setattr(store, "KERNEL_DTYPES", ())
    yield
    torch.set_num_threads(before)


class Past:
    """One sequence's queries, keys and values, and where its tokens lie."""

    def __init__(self, tokens: int, heads: int, blocks: list[int], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.query = torch.randn(tokens, heads, HEAD_DIM, generator=draw)
        self.key, self.value = (torch.randn(tokens, KV_HEADS, HEAD_DIM, generator=draw) for _ in range(2))
        self.blocks = blocks

    def span(self, position: int, end: int) -> Span:
        return Span(position, end - position, self.blocks[: blocks_for(end)])

    def expected(self, position: int, end: int, scale: float, window: int | None) -> Tensor:
        """Plain attention over the whole sequence so far, `[end - position, heads * head_dim]`."""
        visible = torch.ones(end, end, dtype=torch.bool).tril()
        if window is not None:
            visible &= ~torch.ones(end, end, dtype=torch.bool).tril(-window)
        query, key, value = (rows[:end].transpose(0, 1)[None] for rows in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1)[position:].flatten(1)


def scattered(count: int, tokens: int, heads: int = 4) -> list[Past]:
    """Sequences whose blocks are neither neighbours nor in order."""
    free = list(range(BLOCKS))
    random.Random(0).shuffle(free)
    needed = blocks_for(tokens)
    return [Past(tokens, heads, free[one * needed : (one + 1) * needed], one) for one in range(count)]


def new_store(dtype: torch.dtype = torch.float32) -> KVStore:
    return KVStore(LAYER, LAYER + 2, BLOCKS, KV_HEADS, HEAD_DIM, CPU, dtype)


Part = tuple[Past, int, int]


def packed(parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `(sequence, position, end)`, one behind the other."""
    rows = [(past.query[at:end], past.key[at:end], past.value[at:end]) for past, at, end in parts]
    query, key, value = zip(*rows, strict=True)
    return torch.cat(query), torch.cat(key), torch.cat(value)


def attend(
    store: KVStore,
    parts: list[Part],
    scale: float = 0.3,
    window: int | None = None,
    layer: int = LAYER,
) -> list[Tensor]:
    """One batch; its results by part."""
    attention = store.attention([past.span(position, end) for past, position, end in parts])
    query, key, value = packed(parts)
    attended = attention(layer, query, key, value, scale, window)
    return list(torch.split(attended, [end - position for _, position, end in parts]))


def check(past: Past, position: int, end: int, got: Tensor, scale: float = 0.3, window: int | None = None) -> None:
    torch.testing.assert_close(got, past.expected(position, end, scale, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 7, 20, 200])
@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 40])
def test_chunks_are_the_whole(heads: int, window: int | None, chunk: int) -> None:
    (past,) = scattered(1, 40, heads)
    store = new_store()
    for position in range(0, 40, chunk):
        end = min(40, position + chunk)
        (got,) = attend(store, [(past, position, end)], window=window)
        check(past, position, end, got, window=window)


@pytest.mark.parametrize("window", [None, 6])
def test_decode_goes_on_where_the_prompt_ended(window: int | None) -> None:
    (past,) = scattered(1, 50)
    store = new_store()
    attend(store, [(past, 0, 30)], window=window)
    for position in range(30, 50):
        (got,) = attend(store, [(past, position, position + 1)], window=window)
        check(past, position, position + 1, got, window=window)


@pytest.mark.parametrize("window", [None, 9])
def test_a_batch_keeps_its_sequences_apart(window: int | None) -> None:
    decoding, chunked, fresh = scattered(3, 40)
    store = new_store()
    attend(store, [(decoding, 0, 33), (chunked, 0, 20)], window=window)
    parts = [(decoding, 33, 34), (chunked, 20, 37), (fresh, 0, 18)]
    for part, got in zip(parts, attend(store, parts, window=window), strict=True):
        check(*part, got, window=window)


@pytest.mark.parametrize("bounds", [(0, 10, 30, 31), (0, 1, 2, 3)])
def test_two_chunks_of_one_sequence_may_come_in_one_batch(bounds: tuple[int, ...]) -> None:
    past, other = scattered(2, 40)
    store = new_store()
    parts = [(other, 0, 1), *((past, begin, end) for begin, end in pairwise(bounds))]
    for part, got in zip(parts, attend(store, parts), strict=True):
        check(*part, got)


class TestCrowds:
    """Sequences that decode together."""

    @pytest.mark.parametrize("window", [None, 9, 200])
    @pytest.mark.parametrize("ends", [(20, 20, 20), (3, 17, 31), (31, 1, 16)])
    def test_each_sees_its_own_past_alone(self, window: int | None, ends: tuple[int, ...]) -> None:
        pasts = scattered(3, 40)
        store = new_store()
        # What nobody has written yet, and what a broken session has left behind.
        store.kv.fill_(float("nan"))
        for past, end in zip(pasts, ends, strict=True):
            if end > 1:
                attend(store, [(past, 0, end - 1)], window=window)
        parts = [(past, end - 1, end) for past, end in zip(pasts, ends, strict=True)]
        for part, got in zip(parts, attend(store, parts, window=window), strict=True):
            check(*part, got, window=window)

    @pytest.mark.parametrize("most_tokens", [1, 45, 1000])
    def test_long_pasts_are_gathered_one_by_one(self, monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> None:
        monkeypatch.setattr("stitch_server.kv_cache.store.CROWD_TOKENS", most_tokens)
        monkeypatch.setattr("stitch_server.kv_cache.store.FILLING_TOKENS", 2)
        pasts, ends = scattered(4, 40), (18, 40, 19, 39)
        store = new_store()
        attend(store, [(past, 0, end - 1) for past, end in zip(pasts, ends, strict=True)])
        parts = [(past, end - 1, end) for past, end in zip(pasts, ends, strict=True)]
        for part, got in zip(parts, attend(store, parts), strict=True):
            check(*part, got)

    def test_chunks_may_lie_between_them(self) -> None:
        first, chunked, second = scattered(3, 40)
        store = new_store()
        attend(store, [(first, 0, 20), (chunked, 0, 5), (second, 0, 22)])
        parts = [(first, 20, 21), (chunked, 5, 25), (second, 22, 23)]
        for part, got in zip(parts, attend(store, parts), strict=True):
            check(*part, got)

    def test_one_that_is_broken_spoils_no_other(self) -> None:
        sound, broken = scattered(2, 40)
        broken.key = broken.key * float("nan")
        store = new_store()
        attend(store, [(sound, 0, 30), (broken, 0, 10)])
        got, non_finite = attend(store, [(sound, 30, 31), (broken, 10, 11)])
        check(sound, 30, 31, got)
        assert bool(non_finite.isnan().any())


def test_layers_are_kept_apart() -> None:
    first, second = scattered(2, 10)
    second.blocks = first.blocks
    store = new_store()
    attend(store, [(first, 0, 9)])
    attend(store, [(second, 0, 9)], layer=LAYER + 1)
    (got,) = attend(store, [(first, 9, 10)])
    check(first, 9, 10, got)
    (got,) = attend(store, [(second, 9, 10)], layer=LAYER + 1)
    check(second, 9, 10, got)


def test_what_an_earlier_holder_left_is_not_seen() -> None:
    earlier, later = scattered(2, 40)
    later.blocks = earlier.blocks
    store = new_store()
    attend(store, [(earlier, 0, 40)])
    (got,) = attend(store, [(later, 0, 3)])
    check(later, 0, 3, got)


@pytest.mark.parametrize("tokens", [12, 1])
def test_the_leading_segments_attend_alone(tokens: int) -> None:
    parts = [(past, 0, tokens) for past in scattered(3, tokens)]
    store = new_store()
    third = torch.tensor(parts[2][0].blocks) * BLOCK_TOKENS
    store.kv[:, third] = 7.0
    attention = store.attention([past.span(*where) for past, *where in parts])
    query, key, value = packed(parts[:2])
    got = attention.first(2)(LAYER, query, key, value, 0.3, None)
    for part, one in zip(parts[:2], torch.split(got, tokens), strict=True):
        check(*part, one)
    assert bool((store.kv[:, third] == 7.0).all())


def test_the_scale_is_the_callers() -> None:
    (past,) = scattered(1, 8)
    (got,) = attend(new_store(), [(past, 0, 8)], scale=1.7)
    check(past, 0, 8, got, scale=1.7)


def test_half_the_bytes_keep_half_the_precision() -> None:
    (past,) = scattered(1, 20)
    halved = Past(20, 4, past.blocks, 0)
    halved.query, halved.key, halved.value = (rows.bfloat16() for rows in (past.query, past.key, past.value))
    (got,) = attend(new_store(torch.bfloat16), [(halved, 0, 20)])
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), past.expected(0, 20, 0.3, None), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 3])
def test_decoding_over_half_the_bytes_is_near(tokens: int) -> None:
    """Single tokens of two sequences, alone and beside a chunk of a third."""
    pasts, store = scattered(3, 20), new_store(torch.bfloat16)
    for past in pasts:
        past.query, past.key, past.value = (rows.bfloat16() for rows in (past.query, past.key, past.value))
    attend(store, [(pasts[0], 0, 12), (pasts[1], 0, 19)])
    parts = [(pasts[0], 12, 13), (pasts[1], 19, 20), (pasts[2], 0, tokens)]
    for (past, position, end), got in zip(parts, attend(store, parts), strict=True):
        assert got.dtype is torch.bfloat16
        expected = past.expected(position, end, 0.3, None)
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)


def test_a_store_may_have_no_blocks() -> None:
    assert KVStore(0, 1, 0, KV_HEADS, HEAD_DIM, CPU, torch.float32).kv.numel() == 0


def test_a_mask_says_who_sees_whom() -> None:
    mask = causal_mask(Span(2, 3, [0]), 3, torch.zeros(1))
    assert (mask == 0).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert set(mask.flatten().tolist()) == {0.0, float("-inf")}
