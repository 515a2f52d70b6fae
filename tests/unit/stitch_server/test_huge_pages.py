"""Tensors of a `HugePageArena` are aligned, in huge pages, and overlap no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitch_server.huge_pages import ALIGNMENT_BYTES, BLOCK_BYTES, PAGE_BYTES, HugePageArena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (2, 3, 4)])
def test_copy_is_contiguous_and_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    copied = HugePageArena().copy(tensor)
    assert (copied.dtype, copied.is_contiguous()) == (dtype, True)
    assert torch.equal(copied, tensor)


def test_copies_do_not_overlap() -> None:
    arena = HugePageArena()
    tensors = [torch.randn(size) for size in (1, 15, 16, 17, 1000)]
    copies = [arena.copy(tensor) for tensor in tensors]
    for copy in copies[::2]:
        copy.zero_()
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies[1::2], tensors[1::2], strict=True))


def test_copies_are_adjacent_and_aligned_to_vectors() -> None:
    arena = HugePageArena()
    addresses = [arena.copy(torch.ones(5)).data_ptr() for _ in range(3)]
    assert addresses == [addresses[0] + n * ALIGNMENT_BYTES for n in range(3)]
    assert addresses[0] % PAGE_BYTES == 0


def test_strided_tensor_is_copied() -> None:
    wide = torch.randn(4, 10)
    assert torch.equal(HugePageArena().copy(wide[:, ::2]), wide[:, ::2])


def test_tensor_larger_than_a_block_gets_its_own_block() -> None:
    arena = HugePageArena()
    first = arena.copy(torch.ones(3))
    large = arena.copy(torch.full((BLOCK_BYTES // 4 + 1,), 2.0))
    assert bool((large == 2.0).all())
    assert torch.equal(first, torch.ones(3))


def test_block_outlives_its_arena() -> None:
    copied = HugePageArena().copy(torch.arange(1000.0))
    torch.empty(BLOCK_BYTES, dtype=torch.uint8).fill_(7)
    assert torch.equal(copied, torch.arange(1000.0))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this kernel gives no huge pages",
)
def test_memory_is_in_huge_pages() -> None:
    def huge_kib() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages"))

    before = huge_kib()
    kept = HugePageArena().copy(torch.ones(8 * PAGE_BYTES // 4))
    assert huge_kib() - before >= 4 * PAGE_BYTES // 1024, kept.shape
