"""Both back ends for CPUs give what PyTorch's attention gives over one contiguous sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stitch_server.attention import AttentionBackend, backend_for, sdpa
from stitch_server.attention.cpu import CompiledAttention
from stitch_server.attention.sdpa import SdpaAttention, causal_mask, group_by_length
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, blocks_for
from stitch_server.kv_cache.store import KVStore, Span
from tests.support.pairwise_cases import pairwise_cases

pytestmark = pytest.mark.slow

KV_HEADS, HEAD_DIM, BLOCKS = 2, 8, 24
LAYER = 5
CPU = torch.device("cpu")
BackendOf = Callable[[KVStore], AttentionBackend]
BACKENDS = ["sdpa", "compiled", "compiled on two threads"]


def backend_named(name: str) -> BackendOf:
    """Sets the number of threads, too."""
    torch.set_num_threads(2 if name == "compiled on two threads" else 1)
    return (lambda store: partial(SdpaAttention, store)) if name == "sdpa" else backend_for


@pytest.fixture(params=BACKENDS)
def backend_of(request: pytest.FixtureRequest) -> BackendOf:
    return backend_named(request.param)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Context:
    """The queries, keys and values of one sequence, and its blocks."""

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


def scattered(count: int, tokens: int, heads: int = 4) -> list[Context]:
    """Sequences whose blocks are neither adjacent nor in order."""
    free = list(range(BLOCKS))
    random.Random(0).shuffle(free)
    needed = blocks_for(tokens)
    return [Context(tokens, heads, free[one * needed : (one + 1) * needed], one) for one in range(count)]


def new_store(dtype: torch.dtype = torch.float32) -> KVStore:
    return KVStore(LAYER, LAYER + 2, BLOCKS, KV_HEADS, HEAD_DIM, CPU, dtype)


# A sequence, and the positions `[begin, end)` of its new tokens.
NewTokens = tuple[Context, int, int]


def packed(batch: list[NewTokens]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch, concatenated."""
    rows = [(one.query[at:end], one.key[at:end], one.value[at:end]) for one, at, end in batch]
    query, key, value = zip(*rows, strict=True)
    return torch.cat(query), torch.cat(key), torch.cat(value)


def attend(
    backend: AttentionBackend,
    batch: list[NewTokens],
    scale: float = 0.3,
    window: int | None = None,
    layer: int = LAYER,
) -> list[Tensor]:
    """The results of one batch by sequence."""
    attention = backend([context.span(position, end) for context, position, end in batch])
    query, key, value = packed(batch)
    attended = attention(layer, query, key, value, scale, window)
    return list(torch.split(attended, [end - position for _, position, end in batch]))


def check(
    context: Context, position: int, end: int, got: Tensor, scale: float = 0.3, window: int | None = None
) -> None:
    torch.testing.assert_close(got, context.expected(position, end, scale, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "heads", "window", "chunk"),
    pairwise_cases(BACKENDS, [2, 4, 8], [None, 1, 7, 20, 200], [1, 5, 16, 17, 40]),
)
def test_chunked_prefill_equals_one_pass(name: str, heads: int, window: int | None, chunk: int) -> None:
    (context,) = scattered(1, 40, heads)
    backend = backend_named(name)(new_store())
    for position in range(0, 40, chunk):
        end = min(40, position + chunk)
        (got,) = attend(backend, [(context, position, end)], window=window)
        check(context, position, end, got, window=window)


@pytest.mark.parametrize("window", [None, 6])
def test_decode_attends_to_prompt_and_generated_tokens(backend_of: BackendOf, window: int | None) -> None:
    (context,) = scattered(1, 50)
    backend = backend_of(new_store())
    attend(backend, [(context, 0, 30)], window=window)
    for position in range(30, 50):
        (got,) = attend(backend, [(context, position, position + 1)], window=window)
        check(context, position, position + 1, got, window=window)


@pytest.mark.parametrize("window", [None, 9])
def test_sequences_of_one_batch_attend_to_their_own_context(backend_of: BackendOf, window: int | None) -> None:
    decoding, chunked, fresh = scattered(3, 40)
    backend = backend_of(new_store())
    attend(backend, [(decoding, 0, 33), (chunked, 0, 20)], window=window)
    batch = [(decoding, 33, 34), (chunked, 20, 37), (fresh, 0, 18)]
    for tokens, got in zip(batch, attend(backend, batch, window=window), strict=True):
        check(*tokens, got, window=window)


@pytest.mark.parametrize("bounds", [(0, 10, 30, 31), (0, 1, 2, 3)])
def test_several_chunks_of_one_sequence_in_one_batch(backend_of: BackendOf, bounds: tuple[int, ...]) -> None:
    context, other = scattered(2, 40)
    batch = [(other, 0, 1), *((context, begin, end) for begin, end in pairwise(bounds))]
    for tokens, got in zip(batch, attend(backend_of(new_store()), batch), strict=True):
        check(*tokens, got)


class TestDecodeTogether:
    """Sequences that decode in one batch."""

    @pytest.mark.parametrize(
        ("name", "window", "ends"),
        pairwise_cases(BACKENDS, [None, 9, 200], [(20, 20, 20), (3, 17, 31), (31, 1, 16)]),
    )
    def test_contexts_of_different_lengths_keep_apart(
        self, name: str, window: int | None, ends: tuple[int, ...]
    ) -> None:
        contexts, store = scattered(3, 40), new_store()
        backend = backend_named(name)(store)
        # Uninitialized slots, and what a session with non-finite values left.
        store.kv.fill_(float("nan"))
        for context, end in zip(contexts, ends, strict=True):
            if end > 1:
                attend(backend, [(context, 0, end - 1)], window=window)
        batch = [(context, end - 1, end) for context, end in zip(contexts, ends, strict=True)]
        for tokens, got in zip(batch, attend(backend, batch, window=window), strict=True):
            check(*tokens, got, window=window)

    def test_prefill_chunk_between_decoding_sequences(self, backend_of: BackendOf) -> None:
        first, chunked, second = scattered(3, 40)
        backend = backend_of(new_store())
        attend(backend, [(first, 0, 20), (chunked, 0, 5), (second, 0, 22)])
        batch = [(first, 20, 21), (chunked, 5, 25), (second, 22, 23)]
        for tokens, got in zip(batch, attend(backend, batch), strict=True):
            check(*tokens, got)

    def test_non_finite_keys_stay_in_their_sequence(self, backend_of: BackendOf) -> None:
        sound, broken = scattered(2, 40)
        broken.key = broken.key * float("nan")
        backend = backend_of(new_store())
        attend(backend, [(sound, 0, 30), (broken, 0, 10)])
        got, non_finite = attend(backend, [(sound, 30, 31), (broken, 10, 11)])
        check(sound, 30, 31, got)
        assert bool(non_finite.isnan().any())


def test_layers_have_separate_slots(backend_of: BackendOf) -> None:
    first, second = scattered(2, 10)
    second.blocks = first.blocks
    backend = backend_of(new_store())
    attend(backend, [(first, 0, 9)])
    attend(backend, [(second, 0, 9)], layer=LAYER + 1)
    (got,) = attend(backend, [(first, 9, 10)])
    check(first, 9, 10, got)
    (got,) = attend(backend, [(second, 9, 10)], layer=LAYER + 1)
    check(second, 9, 10, got)


def test_values_of_a_block_s_earlier_sequence_are_not_attended(backend_of: BackendOf) -> None:
    earlier, later = scattered(2, 40)
    later.blocks = earlier.blocks
    backend = backend_of(new_store())
    attend(backend, [(earlier, 0, 40)])
    (got,) = attend(backend, [(later, 0, 3)])
    check(later, 0, 3, got)


@pytest.mark.parametrize("tokens", [12, 1])
def test_leading_segments_attend_without_the_others(backend_of: BackendOf, tokens: int) -> None:
    batch, store = [(context, 0, tokens) for context in scattered(3, tokens)], new_store()
    third = torch.tensor(batch[2][0].blocks) * BLOCK_TOKENS
    store.kv[:, third] = 7.0
    attention = backend_of(store)([context.span(*bounds) for context, *bounds in batch])
    query, key, value = packed(batch[:2])
    got = attention.leading(2)(LAYER, query, key, value, 0.3, None)
    for context_tokens, one in zip(batch[:2], torch.split(got, tokens), strict=True):
        check(*context_tokens, one)
    assert bool((store.kv[:, third] == 7.0).all())


def test_scores_are_multiplied_by_the_caller_s_scale(backend_of: BackendOf) -> None:
    (context,) = scattered(1, 8)
    (got,) = attend(backend_of(new_store()), [(context, 0, 8)], scale=1.7)
    check(context, 0, 8, got, scale=1.7)


def test_bfloat16_prefill_is_close_to_float32(backend_of: BackendOf) -> None:
    (context,) = scattered(1, 20)
    halved = Context(20, 4, context.blocks, 0)
    halved.query, halved.key, halved.value = (rows.bfloat16() for rows in (context.query, context.key, context.value))
    (got,) = attend(backend_of(new_store(torch.bfloat16)), [(halved, 0, 20)])
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), context.expected(0, 20, 0.3, None), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 3])
def test_bfloat16_decode_is_close_to_the_reference(backend_of: BackendOf, tokens: int) -> None:
    """Two decoding sequences, together with one more or with a prefill chunk."""
    contexts, backend = scattered(3, 20), backend_of(new_store(torch.bfloat16))
    for context in contexts:
        context.query, context.key, context.value = (
            rows.bfloat16() for rows in (context.query, context.key, context.value)
        )
    attend(backend, [(contexts[0], 0, 12), (contexts[1], 0, 19)])
    batch = [(contexts[0], 12, 13), (contexts[1], 19, 20), (contexts[2], 0, tokens)]
    for (context, position, end), got in zip(batch, attend(backend, batch), strict=True):
        assert got.dtype is torch.bfloat16
        expected = context.expected(position, end, 0.3, None)
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)


class TestBackendFor:
    @pytest.mark.parametrize(
        ("dtype", "backend"),
        [(torch.float32, CompiledAttention), (torch.bfloat16, CompiledAttention), (torch.float16, SdpaAttention)],
    )
    def test_cpu_gets_compiled_kernels_for_the_dtypes_that_these_read(
        self, dtype: torch.dtype, backend: type[object]
    ) -> None:
        attention = backend_for(new_store(dtype))([Span(0, 1, [0])])
        assert isinstance(attention, backend)
        assert (attention.paged_kv is None) == (backend is SdpaAttention)

    def test_store_without_blocks_has_a_backend(self) -> None:
        store = KVStore(0, 1, 0, KV_HEADS, HEAD_DIM, CPU, torch.float32)
        assert store.kv.numel() == 0
        backend_for(store)


class TestPaddedDecodeGroups:
    @pytest.mark.parametrize("max_slots", [1, 45, 1000])
    def test_grouping_leaves_results_unchanged(self, monkeypatch: pytest.MonkeyPatch, max_slots: int) -> None:
        monkeypatch.setattr(sdpa, "MAX_GROUP_SLOTS", max_slots)
        monkeypatch.setattr(sdpa, "MAX_PADDING_TOKENS", 2)
        contexts, ends = scattered(4, 40), (18, 40, 19, 39)
        backend = backend_named("sdpa")(new_store())
        attend(backend, [(context, 0, end - 1) for context, end in zip(contexts, ends, strict=True)])
        batch = [(context, end - 1, end) for context, end in zip(contexts, ends, strict=True)]
        for tokens, got in zip(batch, attend(backend, batch), strict=True):
            check(*tokens, got)

    def test_group_ends_where_padding_would_exceed_its_limit(self) -> None:
        assert group_by_length({0: 100, 1: 1000, 2: 189, 3: 190, 4: 100}) == [[0, 2, 4], [3], [1]]

    def test_group_ends_where_it_would_gather_too_many_slots(self) -> None:
        assert group_by_length({0: 3000, 1: 3000, 2: 3000, 3: 9000}) == [[0, 1], [2], [3]]


def test_causal_mask_hides_later_tokens_and_those_before_the_window() -> None:
    mask = causal_mask(Span(2, 3, [0]), 3, torch.zeros(1))
    assert (mask == 0).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert set(mask.flatten().tolist()) == {0.0, float("-inf")}
