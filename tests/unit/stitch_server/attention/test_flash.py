"""Flash attention over pages gives what gathering and SDPA give, for every kind of batch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from stitch_server.attention.flash import PAGE_TOKENS, FlashAttention, Kernel, kernel_for, packed_places
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore, PagedAttention
from tests.support.varlen import varlen

KV_HEADS, HEAD_DIM = 2, 8
FIRST, END = 3, 6
PAGES, MOST_TOKENS = 16, 3 * PAGE_TOKENS + 40
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Both:
    """The same sequences in a store for each kind of attention, in scattered blocks of different sizes."""

    def __init__(self, sequences: int, heads: int = 4) -> None:
        shape = FIRST, END
        self.paged = KVStore(*shape, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.float32, PAGE_TOKENS, varlen)
        self.plain = KVStore(*shape, PAGES * PAGE_TOKENS // 16, KV_HEADS, HEAD_DIM, CPU, torch.float32)
        for store in (self.paged, self.plain):
            # What nobody has written yet, and what a broken session has left behind.
            store.kv.fill_(float("nan"))
        self.heads = heads
        self.blocks = {store: self.scattered(store, sequences) for store in (self.paged, self.plain)}
        self.ends = [0] * sequences
        self.draw = torch.Generator().manual_seed(0)

    @staticmethod
    def scattered(store: KVStore, sequences: int) -> list[list[int]]:
        free = list(range(store.blocks))
        random.Random(0).shuffle(free)
        each = blocks_for(MOST_TOKENS, store.block_tokens)
        return [free[one * each : (one + 1) * each] for one in range(sequences)]

    def spans(self, store: KVStore, lengths: Sequence[tuple[int, int]]) -> list[Span]:
        return [Span(self.ends[one], length, self.blocks[store][one]) for one, length in lengths]

    def attentions(self, *lengths: tuple[int, int]) -> tuple[FlashAttention, PagedAttention]:
        """For a batch of `(sequence, new tokens)`."""
        flash = self.paged.attention(self.spans(self.paged, lengths))
        assert isinstance(flash, FlashAttention)
        return flash, PagedAttention(self.plain, self.spans(self.plain, lengths))

    def rows(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as a layer gives them: views of one tensor."""
        qkv = torch.randn(tokens, self.heads + 2 * KV_HEADS, HEAD_DIM, generator=self.draw)
        query, key, value = qkv.split([self.heads, KV_HEADS, KV_HEADS], dim=1)
        return query, key, value

    def check(self, *lengths: tuple[int, int], window: int | None = None, layers: Sequence[int] = (FIRST,)) -> None:
        """Both see the same in the next tokens of some sequences; afterwards these have them."""
        flash, plain = self.attentions(*lengths)
        for layer in layers:
            given = (layer, *self.rows(sum(length for _, length in lengths)), 0.3, window)
            torch.testing.assert_close(flash(*given), plain(*given), rtol=1e-5, atol=1e-5)
        for one, length in lengths:
            self.ends[one] += length


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 7, 300, 2000])
def test_prompts_in_chunks_and_then_single_tokens(heads: int, window: int | None) -> None:
    both = Both(1, heads)
    for length in (250, 5, 1, 1, 300, 1, 255, 1):
        both.check((0, length), window=window)


@pytest.mark.parametrize("window", [None, 9, 270])
def test_sequences_of_a_mixed_batch_keep_apart(window: int | None) -> None:
    both = Both(3)
    both.check((0, 333), (1, 20), window=window)
    both.check((0, 1), (1, 300), (2, 18), window=window)
    both.check((2, 1), (0, 1), (1, 1), window=window)
    both.check((1, 2), (0, 1), (2, 257), window=window)


def test_two_chunks_of_one_sequence_may_come_in_one_batch() -> None:
    both = Both(2)
    both.check((1, 7))
    flash, plain = (
        store.attention([Span(0, 250, both.blocks[store][0]), Span(250, 9, both.blocks[store][0])])
        for store in (both.paged, both.plain)
    )
    given = (FIRST, *both.rows(259), 0.3, None)
    torch.testing.assert_close(flash(*given), plain(*given), rtol=1e-5, atol=1e-5)


def test_layers_are_kept_apart() -> None:
    both = Both(2)
    for lengths in ([(0, 200), (1, 70)], [(0, 1), (1, 200)], [(1, 1), (0, 1)]):
        both.check(*lengths, layers=range(FIRST, END))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_leading_segments_attend_alone(count: int) -> None:
    both = Both(3)
    both.check((0, 100), (1, 300), (2, 5))
    lengths = [(1, 1), (0, 200), (2, 1)]
    before = both.paged.kv.clone()
    flash, plain = both.attentions(*lengths)
    given = (FIRST, *both.rows(sum(length for _, length in lengths[:count])), 0.3, None)
    torch.testing.assert_close(flash.first(count)(*given), plain.first(count)(*given), rtol=1e-5, atol=1e-5)
    written = (both.paged.kv[0] != before[0]).logical_and(both.paged.kv[0].isfinite()).any(dim=(1, 2))
    assert int(written.sum()) == sum(length for _, length in lengths[:count])


def test_half_the_bytes_keep_half_the_precision() -> None:
    store = KVStore(0, 1, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.bfloat16, PAGE_TOKENS, varlen)
    exact = KVStore(0, 1, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.float32, PAGE_TOKENS, varlen)
    rows = [torch.randn(300, heads, HEAD_DIM) for heads in (4, KV_HEADS, KV_HEADS)]
    got = store.attention([Span(0, 300, [3, 1])])(0, *(one.bfloat16() for one in rows), 0.3, None)
    expected = exact.attention([Span(0, 300, [3, 1])])(0, *rows, 0.3, None)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


class TestPlaces:
    def test_what_travels_is_one_tensor_of_ints(self) -> None:
        packed = packed_places([Span(255, 2, [4, 2, 9]), Span(0, 1, [7])], PAGE_TOKENS)
        assert packed.dtype is torch.int32
        assert packed.tolist() == [
            *(4 * 256 + 255, 2 * 256, 7 * 256),  # new slots
            *(0, 2, 3),  # rows
            *(0, 257, 258),  # pasts
            *(257, 1),  # ends
            *(4, 2, 7, 0),  # pages; the first sequence's third one is still empty
        ]

    def test_there_may_be_room_for_more_pages(self) -> None:
        assert packed_places([Span(0, 1, [5])], PAGE_TOKENS, width=4).tolist()[-4:] == [5, 0, 0, 0]

    def test_a_layer_calls_the_kernel_once_with_what_is_on_the_device(self) -> None:
        """All layers get the very same tensors: nothing of the batch is made anew in a layer."""
        queries: list[tuple[Any, ...]] = []

        def noting(*given: Any, **named: Any) -> Tensor:
            queries.append((*given[3:5], named["seqused_k"], named["block_table"]))
            return varlen(*given, **named)

        both = Both(2)
        both.paged.kernel = noting
        both.check((0, 260), (1, 1), layers=range(FIRST, END))
        assert len(queries) == END - FIRST
        assert all(one is other for later in queries[1:] for one, other in zip(queries[0], later, strict=True))


class TestKernel:
    """Which devices have one."""

    @pytest.fixture(autouse=True)
    def _ampere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_a_gpu_has_that_of_pytorch(self, dtype: torch.dtype, head_dim: int) -> None:
        assert kernel_for(GPU, dtype, head_dim) is varlen_attn

    @pytest.mark.parametrize(
        ("device", "dtype", "head_dim"),
        [
            (CPU, torch.bfloat16, 64),
            (GPU, torch.float32, 64),
            (GPU, torch.bfloat16, 60),
            (GPU, torch.bfloat16, 264),
        ],
    )
    def test_others_have_none(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        assert kernel_for(device, dtype, head_dim) is None

    def test_nor_has_one_before_ampere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert kernel_for(GPU, torch.bfloat16, 64) is None

    def test_nor_has_one_of_another_maker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert kernel_for(GPU, torch.bfloat16, 64) is None

    def test_the_reference_and_pytorch_are_called_alike(self) -> None:
        """With the same names in the same order, and the same defaults."""
        ours, theirs = (inspect.signature(one).parameters for one in (Kernel.__call__, varlen_attn))
        queries = [one for name, one in ours.items() if name != "self"]
        known = [one for name, one in theirs.items() if name != "return_aux"]
        assert [(one.name, one.kind, one.default) for one in queries] == [
            (one.name, one.kind, one.default) for one in known
        ]
        given = inspect.signature(varlen).parameters.values()
        assert [(one.name, one.kind, one.default) for one in given] == [
            (one.name, one.kind, one.default) for one in known
        ]
