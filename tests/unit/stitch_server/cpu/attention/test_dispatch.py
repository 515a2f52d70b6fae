"""Paged attention: every token attends to its sequence up to itself, over the cache that the kernels have written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from threading import Thread

import numpy as np
import pytest
import torch

from stitch_server.cpu import Indices, PagedKV, attend_shared, has_amx, new_task_counts, slot_mapping, store_all_kv
from stitch_server.cpu.attention.prefill import KEY_TILE
from stitch_server.devices import as_bits

pytestmark = pytest.mark.slow

# Some are half-way between two bfloat16, some round up to infinity, and one is denormal.
VALUES = torch.tensor(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, 1e-40, float("inf"), -float("inf")]
)


def stored(values: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Stores one token's key and value, and reads them from the cache."""
    paged = PagedKV(0, as_bits(kv)[None], np.array([3, 1]), np.array([0]), np.array([2]))
    store_all_kv(values.view(1, 2, -1).numpy(), paged.kv[0], paged)
    return kv[1].flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_rounded_as_by_pytorch(dtype: torch.dtype) -> None:
    values = torch.cat([VALUES, -VALUES, torch.randn(4096, generator=torch.Generator().manual_seed(0))])
    kv = torch.full((4, 2, len(values) // 2), 7.0, dtype=dtype)
    assert torch.equal(stored(values, kv), values.to(dtype))
    assert bool((kv[[0, 2, 3]] == 7.0).all())


def test_nan_stays_nan_in_bfloat16() -> None:
    # Rounding up all bits of a float32 would make a zero of the first.
    values = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(stored(values, torch.zeros(4, 2, 2, dtype=torch.bfloat16)).isnan().all())


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    slots: Indices,
    begins: Indices,
    ends: Indices,
    window: int,
    scale: float,
    attended: torch.Tensor,
    threads: int = 1,
    use_amx: bool = False,
) -> None:
    """Attends on `threads` threads, which share the tasks."""
    paged, counts = PagedKV(0, as_bits(kv)[None], slots, begins, ends), new_task_counts()
    arguments = query.numpy(), paged, paged.kv[0], window, scale, attended.numpy(), use_amx, threads, counts
    helpers = [Thread(target=attend_shared, args=arguments) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    attend_shared(*arguments)
    for helper in helpers:
        helper.join()


USE_AMX = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX")),
]


# Heads and head sizes that fill register tiles, that leave some of one over, and that have none.
SHAPES = [(9, 3, 64), (14, 2, 64), (12, 2, 128), (4, 4, 32), (6, 1, 80), (2, 1, 16), (3, 3, 24)]
WINDOWS = [0, 5, 18]
DTYPES = [torch.float32, torch.bfloat16]
# Threads, and query heads after those that attend.
SHARING = [(1, 0), (3, 2)]
# Context and new tokens: within a key tile, and over the borders of several, where the largest score may change.
PREFILLS = [(30, 2), (30, 5), (30, 40), (30, 110), (KEY_TILE - 3, 7), (600, 20), (250, 170)]


@dataclass(frozen=True)
class Case:
    """Heads and a way to attend."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    dtype: torch.dtype
    threads: int
    extra_heads: int


def case(shape: int, window: int, other: int) -> Case:
    """A shape and a window by their indices; dtype and threads alternate with `other`."""
    return Case(*SHAPES[shape], WINDOWS[window], DTYPES[other % 2], *SHARING[other // 2 % 2])


@pytest.mark.parametrize("use_amx", USE_AMX)
@pytest.mark.parametrize("case", [case(s, w, s + w) for s in range(len(SHAPES)) for w in range(len(WINDOWS))], ids=str)
def test_decode_attends_to_the_context_and_the_token_itself(case: Case, use_amx: bool) -> None:
    draw = torch.Generator().manual_seed(case.heads)
    lengths = [1, 3, 17, 33, 140]
    # Each sequence has any of the blocks of sixteen slots.
    slots = [
        (torch.randperm(12, generator=draw)[: -(-length // 16), None] * 16 + torch.arange(16)).flatten()[:length]
        for length in lengths
    ]
    kv = torch.randn(200, 2 * case.kv_heads, case.head_dim, generator=draw).to(case.dtype)
    query = torch.randn(len(lengths), case.heads + case.extra_heads, case.head_dim, generator=draw)
    bounds = np.array([0, *accumulate(lengths)])
    attended = torch.full((len(lengths), case.heads, case.head_dim), float("nan"))
    mapping = torch.cat(slots).numpy(), bounds[:-1], bounds[1:]
    attend(query, kv, *mapping, case.window, 0.2, attended, case.threads, use_amx)
    exact = expected(query[:, : case.heads], kv, *mapping, case.window)
    torch.testing.assert_close(attended.double(), exact, rtol=1e-5, atol=1e-5)


# Every shape with every prefill, which meets all windows, dtypes and numbers of threads.
@pytest.mark.parametrize("use_amx", USE_AMX)
@pytest.mark.parametrize(
    ("case", "context", "tokens"),
    [
        (case(s, (s + p) % len(WINDOWS), s + p // 2), *prefill)
        for s in range(len(SHAPES))
        for p, prefill in enumerate(PREFILLS)
    ],
    ids=str,
)
def test_prefill_attends_to_no_later_token(case: Case, context: int, tokens: int, use_amx: bool) -> None:
    draw = torch.Generator().manual_seed(case.heads)
    decoding, length = 19, context + tokens
    slots = torch.cat([torch.randperm(length, generator=draw), torch.arange(length, length + decoding)])
    kv = torch.randn(length + decoding, 2 * case.kv_heads, case.head_dim, generator=draw).to(case.dtype)
    query = torch.randn(tokens + 1, case.heads + case.extra_heads, case.head_dim, generator=draw)
    attended = torch.full((tokens + 1, case.heads, case.head_dim), float("nan"))
    begins = np.array([0] * tokens + [length])
    ends = np.array([*range(context + 1, length + 1), length + decoding])
    attend(query, kv, slots.numpy(), begins, ends, case.window, 0.2, attended, case.threads, use_amx)
    exact = expected(query[:, : case.heads], kv, slots.numpy(), begins, ends, case.window)
    torch.testing.assert_close(attended.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX")
def test_amx_attention_errs_no_more_than_vectors() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = 320
    kv, query = torch.randn(tokens, 6, 64, generator=draw), torch.randn(tokens, 9, 64, generator=draw)
    begins, ends = np.zeros(tokens, np.int64), np.arange(1, tokens + 1)
    wanted = expected(query, kv, np.arange(tokens), begins, ends, 0)
    errors = []
    for use_amx in (False, True):
        attended = torch.empty(tokens, 9, 64)
        attend(query, kv, np.arange(tokens), begins, ends, 0, 0.2, attended, use_amx=use_amx)
        errors.append(float((attended - wanted).square().mean().sqrt()))
    assert errors[1] <= errors[0]


def expected(
    query: torch.Tensor, kv: torch.Tensor, slots: Indices, begins: Indices, ends: Indices, window: int
) -> torch.Tensor:
    """Attention `[tokens, heads, head_dim]` in float64 of each token to slots[begin:end], or the last of a window."""
    heads, kv_heads = query.shape[1], kv.shape[1] // 2
    keys, values = kv[slots].double().repeat_interleave(heads // kv_heads, dim=1).tensor_split(2, dim=1)
    first = np.maximum(begins, ends - window) if window else begins
    index = np.arange(len(slots))
    visible = torch.from_numpy((first[:, None] <= index) & (index < ends[:, None]))
    scores = torch.einsum("thd,shd->ths", query.double(), keys) * 0.2
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("ths,shd->thd", weights, values)


def test_softmax_is_exact_to_the_last_digits() -> None:
    # With two keys whose scores are -score and 0, the softmax is a sigmoid.
    scores = torch.linspace(-80, 0, 4001)
    kv = torch.zeros(2, 2, 16)
    kv[0, 0, 0], kv[1, 1, 0] = 1, 1
    query = torch.zeros(len(scores), 1, 16)
    query[:, 0, 0] = -scores
    attended = torch.empty(len(scores), 1, 16)
    slots, bounds = np.array([0, 1] * len(scores)), np.arange(len(scores) + 1) * 2
    attend(query, kv, slots, bounds[:-1], bounds[1:], 0, 1.0, attended)
    torch.testing.assert_close(attended[:, 0, 0].double(), scores.double().sigmoid(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_non_finite_key_or_value_makes_only_its_sequence_non_finite(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    kv, query = torch.randn(48, 2, 64, generator=draw), torch.randn(3, 4, 64, generator=draw)
    kv[20, ["key", "value"].index(kind), 7] = float("nan")
    attended = torch.empty(3, 4, 64)
    begins = np.array([0, 16, 32])
    attend(query, kv, np.arange(48), begins, begins + 16, 0, 0.2, attended)
    assert attended.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_slot_mapping_lists_the_slots_of_each_sequence_in_its_blocks() -> None:
    spans = np.array([[5, 1], [2, 2], [4, 3]])
    slots, begins, ends = slot_mapping(spans, np.array([7, 1, 0, 3]), 4)
    assert slots.tolist() == [28, 29, 30, 31, 4, 0, 1, 12, 13, 14, 15]
    assert begins.tolist() == [0, 5, 5, 7, 7, 7]
    assert ends.tolist() == [5, 6, 7, 9, 10, 11]


def test_slot_mapping_of_no_sequence_is_empty() -> None:
    mapping = slot_mapping(np.empty((0, 2), np.int64), np.empty(0, np.int64), 4)
    assert [len(part) for part in mapping] == [0, 0, 0]
