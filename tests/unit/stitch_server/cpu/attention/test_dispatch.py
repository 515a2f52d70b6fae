"""Numbers that kernels read and write are PyTorch's, and what they attend to is what is seen."""

from __future__ import annotations

from itertools import accumulate
from threading import Thread

import numpy as np
import pytest
import torch

from stitch_server.cpu.attention.dispatch import PagedKV, attend_shared, store_all_kv
from stitch_server.cpu.attention.prefill import KEY_TILE
from stitch_server.cpu.features import has_amx
from stitch_server.cpu.scalars import Indices
from stitch_server.cpu.tasks import new_task_counts
from stitch_server.devices import as_bits

# Among them what lies half-way between two bfloat16, what rounds up to infinity, and what a float32 can hardly hold.
VALUES = torch.tensor(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, 1e-40, float("inf"), -float("inf")]
)


def kept(values: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """One token's key and value, as they come out of the cache."""
    paged = PagedKV(0, as_bits(kv)[None], np.array([3, 1]), np.array([0]), np.array([2]))
    store_all_kv(values.view(1, 2, -1).numpy(), paged.kv[0], paged)
    return kv[1].flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_rounded_as_pytorch_does(dtype: torch.dtype) -> None:
    values = torch.cat([VALUES, -VALUES, torch.randn(4096, generator=torch.Generator().manual_seed(0))])
    kv = torch.full((4, 2, len(values) // 2), 7.0, dtype=dtype)
    assert torch.equal(kept(values, kv), values.to(dtype))
    assert bool((kv[[0, 2, 3]] == 7.0).all())


def test_what_is_no_number_stays_none() -> None:
    # Rounding up all bits of a float32 would make a zero of the first.
    values = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(kept(values, torch.zeros(4, 2, 2, dtype=torch.bfloat16)).isnan().all())


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
    in_tiles: bool = False,
) -> None:
    """By so many threads, each of which takes every other task."""
    paged, counts = PagedKV(0, as_bits(kv)[None], slots, begins, ends), new_task_counts()
    arguments = query.numpy(), paged, paged.kv[0], window, scale, attended.numpy(), in_tiles, threads, counts
    helpers = [Thread(target=attend_shared, args=arguments) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    attend_shared(*arguments)
    for helper in helpers:
        helper.join()


IN_TILES = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")),
]


# Heads and lengths that fill tiles, that leave some of one over, and that have none.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (14, 2, 64), (12, 2, 128), (4, 4, 32), (6, 1, 80), (2, 1, 16), (3, 3, 24)],
)
@pytest.mark.parametrize("window", [0, 5, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("threads", "beside"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("in_tiles", IN_TILES)
class TestAttention:
    def test_is_the_mean_of_what_is_seen(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        beside: int,
        window: int,
        dtype: torch.dtype,
        threads: int,
        in_tiles: bool,
    ) -> None:
        draw = torch.Generator().manual_seed(heads)
        lengths = [1, 3, 17, 33, 140]
        # Each sequence's blocks of sixteen slots lie anywhere.
        slots = [
            (torch.randperm(12, generator=draw)[: -(-length // 16), None] * 16 + torch.arange(16)).flatten()[:length]
            for length in lengths
        ]
        kv = torch.randn(200, 2 * kv_heads, head_dim, generator=draw).to(dtype)
        query = torch.randn(len(lengths), heads + beside, head_dim, generator=draw)
        attended = torch.full((len(lengths), heads, head_dim), float("nan"))
        bounds = np.array([0, *accumulate(lengths)])
        places = torch.cat(slots).numpy(), bounds[:-1], bounds[1:]
        attend(query, kv, *places, window, 0.2, attended, threads, in_tiles)
        for row, visible in enumerate(slots):
            torch.testing.assert_close(
                attended[row].double(),
                expected(query[row, :heads], kv[visible[-window:]], kv_heads),
                rtol=1e-5,
                atol=1e-5,
            )

    # Pasts within a part, and over the borders of several, where the largest score so far may change.
    @pytest.mark.parametrize(
        ("before", "tokens"), [(30, 2), (30, 5), (30, 40), (30, 110), (KEY_TILE - 3, 7), (600, 20), (250, 170)]
    )
    def test_neighbours_of_one_sequence_see_no_later_ones(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        beside: int,
        window: int,
        dtype: torch.dtype,
        threads: int,
        in_tiles: bool,
        before: int,
        tokens: int,
    ) -> None:
        draw = torch.Generator().manual_seed(heads)
        alone, length = 19, before + tokens
        slots = torch.cat([torch.randperm(length, generator=draw), torch.arange(length, length + alone)])
        kv = torch.randn(length + alone, 2 * kv_heads, head_dim, generator=draw).to(dtype)
        query = torch.randn(tokens + 1, heads + beside, head_dim, generator=draw)
        attended = torch.full((tokens + 1, heads, head_dim), float("nan"))
        begins = np.array([0] * tokens + [length])
        ends = np.array([*range(before + 1, length + 1), length + alone])
        attend(query, kv, slots.numpy(), begins, ends, window, 0.2, attended, threads, in_tiles)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            torch.testing.assert_close(
                attended[row].double(),
                expected(query[row, :heads], kv[slots[begin:end][-window:]], kv_heads),
                rtol=1e-5,
                atol=1e-5,
            )


@pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")
def test_tiles_err_no_more_than_vectors() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = 320
    kv, query = torch.randn(tokens, 6, 64, generator=draw), torch.randn(tokens, 9, 64, generator=draw)
    begins, ends = np.zeros(tokens, np.int64), np.arange(1, tokens + 1)
    wanted = torch.stack([expected(query[row], kv[: row + 1], 3) for row in range(tokens)])
    errors = []
    for in_tiles in (False, True):
        attended = torch.empty(tokens, 9, 64)
        attend(query, kv, np.arange(tokens), begins, ends, 0, 0.2, attended, in_tiles=in_tiles)
        errors.append(float((attended - wanted).square().mean().sqrt()))
    assert errors[1] <= errors[0]


def expected(query: torch.Tensor, visible: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean of values `[heads, head_dim]` in float64, of one row's `query` and all pairs that it sees."""
    heads = len(query)
    keys, values = visible.double().repeat_interleave(heads // kv_heads, dim=1).split(heads, dim=1)
    shares = (torch.einsum("hd,phd->hp", query.double(), keys) * 0.2).softmax(dim=1)
    return torch.einsum("hp,phd->hd", shares, values)


def test_powers_of_e_are_right_to_the_last_digits() -> None:
    # Behind the softmax of two tokens that see what is told apart by one score alone.
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
def test_what_is_not_finite_stays_with_its_token(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    kv, query = torch.randn(48, 2, 64, generator=draw), torch.randn(3, 4, 64, generator=draw)
    kv[20, ["key", "value"].index(kind), 7] = float("nan")
    attended = torch.empty(3, 4, 64)
    begins = np.array([0, 16, 32])
    attend(query, kv, np.arange(48), begins, begins + 16, 0, 0.2, attended)
    assert attended.isfinite().flatten(1).all(1).tolist() == [True, False, True]
