"""Flash attention over pages gives what SDPA over gathered blocks gives, for every kind of batch."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from stitch_server.attention import backend_for
from stitch_server.attention.flash import PAGE_TOKENS, FlashAttention, VarlenKernel, pack_metadata, varlen_kernel_for
from stitch_server.attention.sdpa import SdpaAttention
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.store import KVStore, Span
from tests.support.reference_varlen_kernel import reference_varlen

KV_HEADS, HEAD_DIM = 2, 8
FIRST, END = 3, 6
PAGES, MAX_TOKENS = 16, 3 * PAGE_TOKENS + 40
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class BothBackends:
    """The same sequences in a store for flash attention and in one for SDPA, in scattered blocks of different sizes."""

    def __init__(self, sequences: int, heads: int = 4) -> None:
        shape = FIRST, END
        self.paged = KVStore(*shape, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.float32, PAGE_TOKENS)
        self.plain = KVStore(*shape, PAGES * PAGE_TOKENS // 16, KV_HEADS, HEAD_DIM, CPU, torch.float32)
        for store in (self.paged, self.plain):
            # Uninitialized slots, and what a session with non-finite values left.
            store.kv.fill_(float("nan"))
        self.kernel: Any = reference_varlen
        self.heads = heads
        self.blocks = {store: self.scattered(store, sequences) for store in (self.paged, self.plain)}
        self.ends = [0] * sequences
        self.draw = torch.Generator().manual_seed(0)

    @staticmethod
    def scattered(store: KVStore, sequences: int) -> list[list[int]]:
        free = list(range(store.blocks))
        random.Random(0).shuffle(free)
        each = blocks_for(MAX_TOKENS, store.block_tokens)
        return [free[one * each : (one + 1) * each] for one in range(sequences)]

    def spans(self, store: KVStore, lengths: Sequence[tuple[int, int]]) -> list[Span]:
        return [Span(self.ends[one], length, self.blocks[store][one]) for one, length in lengths]

    def attentions(self, *lengths: tuple[int, int]) -> tuple[FlashAttention, SdpaAttention]:
        """For a batch of `(sequence, new tokens)`."""
        flash = backend_for(self.paged, self.kernel)(self.spans(self.paged, lengths))
        assert isinstance(flash, FlashAttention)
        return flash, SdpaAttention(self.plain, self.spans(self.plain, lengths))

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as a layer makes them: views of one tensor."""
        qkv = torch.randn(tokens, self.heads + 2 * KV_HEADS, HEAD_DIM, generator=self.draw)
        query, key, value = qkv.split([self.heads, KV_HEADS, KV_HEADS], dim=1)
        return query, key, value

    def check(self, *lengths: tuple[int, int], window: int | None = None, layers: Sequence[int] = (FIRST,)) -> None:
        """Both give the same for the next tokens of some sequences, which then are longer by these."""
        flash, plain = self.attentions(*lengths)
        for layer in layers:
            given = (layer, *self.qkv(sum(length for _, length in lengths)), 0.3, window)
            torch.testing.assert_close(flash(*given), plain(*given), rtol=1e-5, atol=1e-5)
        for one, length in lengths:
            self.ends[one] += length


@pytest.mark.parametrize(
    ("heads", "window"), [(2, None), (4, None), (8, None), (2, 1), (4, 7), (8, 300), (4, 2000), (2, 300)]
)
def test_chunked_prefill_and_decode_equal_sdpa(heads: int, window: int | None) -> None:
    both = BothBackends(1, heads)
    for length in (250, 5, 1, 1, 300, 1, 255, 1):
        both.check((0, length), window=window)


@pytest.mark.parametrize("window", [None, 9, 270])
def test_sequences_of_a_mixed_batch_equal_sdpa(window: int | None) -> None:
    both = BothBackends(3)
    both.check((0, 333), (1, 20), window=window)
    both.check((0, 1), (1, 300), (2, 18), window=window)
    both.check((2, 1), (0, 1), (1, 1), window=window)
    both.check((1, 2), (0, 1), (2, 257), window=window)


def test_two_chunks_of_one_sequence_in_one_batch() -> None:
    both = BothBackends(2)
    both.check((1, 7))
    flash, plain = (
        backend([Span(0, 250, both.blocks[store][0]), Span(250, 9, both.blocks[store][0])])
        for store, backend in (
            (both.paged, backend_for(both.paged, reference_varlen)),
            (both.plain, backend_for(both.plain)),
        )
    )
    given = (FIRST, *both.qkv(259), 0.3, None)
    torch.testing.assert_close(flash(*given), plain(*given), rtol=1e-5, atol=1e-5)


def test_layers_have_separate_slots() -> None:
    both = BothBackends(2)
    for lengths in ([(0, 200), (1, 70)], [(0, 1), (1, 200)], [(1, 1), (0, 1)]):
        both.check(*lengths, layers=range(FIRST, END))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_leading_segments_attend_without_the_others(count: int) -> None:
    both = BothBackends(3)
    both.check((0, 100), (1, 300), (2, 5))
    lengths = [(1, 1), (0, 200), (2, 1)]
    before = both.paged.kv.clone()
    flash, plain = both.attentions(*lengths)
    given = (FIRST, *both.qkv(sum(length for _, length in lengths[:count])), 0.3, None)
    torch.testing.assert_close(flash.leading(count)(*given), plain.leading(count)(*given), rtol=1e-5, atol=1e-5)
    written = (both.paged.kv[0] != before[0]).logical_and(both.paged.kv[0].isfinite()).any(dim=(1, 2))
    assert int(written.sum()) == sum(length for _, length in lengths[:count])


def test_bfloat16_is_close_to_float32() -> None:
    store = KVStore(0, 1, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.bfloat16, PAGE_TOKENS)
    exact = KVStore(0, 1, PAGES, KV_HEADS, HEAD_DIM, CPU, torch.float32, PAGE_TOKENS)
    rows = [torch.randn(300, heads, HEAD_DIM) for heads in (4, KV_HEADS, KV_HEADS)]
    got = backend_for(store, reference_varlen)([Span(0, 300, [3, 1])])(0, *(one.bfloat16() for one in rows), 0.3, None)
    expected = backend_for(exact, reference_varlen)([Span(0, 300, [3, 1])])(0, *rows, 0.3, None)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


class TestMetadata:
    def test_packed_metadata_is_one_int32_tensor(self) -> None:
        packed = pack_metadata([Span(255, 2, [4, 2, 9]), Span(0, 1, [7])], PAGE_TOKENS)
        assert packed.dtype is torch.int32
        assert packed.tolist() == [
            *(4 * 256 + 255, 2 * 256, 7 * 256),  # slot_mapping
            *(0, 2, 3),  # cu_seq_q
            *(0, 257, 258),  # cu_seq_k
            *(257, 1),  # seqused_k
            *(4, 2, 7, 0),  # block_table; the first sequence does not use its third block yet
        ]

    def test_block_table_is_padded_to_its_width(self) -> None:
        assert pack_metadata([Span(0, 1, [5])], PAGE_TOKENS, table_width=4).tolist()[-4:] == [5, 0, 0, 0]

    def test_each_layer_calls_the_kernel_once_with_the_same_tensors(self) -> None:
        """No layer makes or sends metadata of its own."""
        queries: list[tuple[Any, ...]] = []

        def record(*given: Any, **named: Any) -> Tensor:
            queries.append((*given[3:5], named["seqused_k"], named["block_table"]))
            return reference_varlen(*given, **named)

        both = BothBackends(2)
        both.kernel = record
        both.check((0, 260), (1, 1), layers=range(FIRST, END))
        assert len(queries) == END - FIRST
        assert all(one is other for later in queries[1:] for one, other in zip(queries[0], later, strict=True))


class TestVarlenKernel:
    """The devices, dtypes and head sizes that PyTorch's kernel supports."""

    @pytest.fixture(autouse=True)
    def _ampere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_ampere_gpu_gets_pytorch_s_kernel(self, dtype: torch.dtype, head_dim: int) -> None:
        assert varlen_kernel_for(GPU, dtype, head_dim) is varlen_attn

    @pytest.mark.parametrize(
        ("device", "dtype", "head_dim"),
        [
            (CPU, torch.bfloat16, 64),
            (GPU, torch.float32, 64),
            (GPU, torch.bfloat16, 60),
            (GPU, torch.bfloat16, 264),
        ],
    )
    def test_unsupported_device_dtype_or_head_size_gets_none(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> None:
        assert varlen_kernel_for(device, dtype, head_dim) is None

    def test_gpu_before_ampere_gets_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert varlen_kernel_for(GPU, torch.bfloat16, 64) is None

    def test_rocm_gpu_gets_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert varlen_kernel_for(GPU, torch.bfloat16, 64) is None

    def test_protocol_and_reference_have_pytorch_s_signature(self) -> None:
        """With the same names in the same order, and the same defaults."""
        ours, theirs = (inspect.signature(one).parameters for one in (VarlenKernel.__call__, varlen_attn))
        queries = [one for name, one in ours.items() if name != "self"]
        known = [one for name, one in theirs.items() if name != "return_aux"]
        assert [(one.name, one.kind, one.default) for one in queries] == [
            (one.name, one.kind, one.default) for one in known
        ]
        given = inspect.signature(reference_varlen).parameters.values()
        assert [(one.name, one.kind, one.default) for one in given] == [
            (one.name, one.kind, one.default) for one in known
        ]
