"""Copies in large pages are what was copied, apart from each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stitch_server.pages import ALIGNMENT_BYTES, BLOCK_BYTES, PAGE_BYTES, LargePages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,), (2, 3, 4)])
def test_a_copy_is_equal(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    copied = LargePages().copied(tensor)
    assert (copied.dtype, copied.is_contiguous()) == (dtype, True)
    assert torch.equal(copied, tensor)


def test_copies_do_not_touch_each_other() -> None:
    pages = LargePages()
    tensors = [torch.randn(size) for size in (1, 15, 16, 17, 1000)]
    copies = [pages.copied(tensor) for tensor in tensors]
    for copy in copies[::2]:
        copy.zero_()
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies[1::2], tensors[1::2], strict=True))


def test_copies_lie_side_by_side_where_vectors_begin() -> None:
    pages = LargePages()
    places = [pages.copied(torch.ones(5)).data_ptr() for _ in range(3)]
    assert places == [places[0] + n * ALIGNMENT_BYTES for n in range(3)]
    assert places[0] % PAGE_BYTES == 0


def test_takes_rows_that_lie_apart() -> None:
    wide = torch.randn(4, 10)
    assert torch.equal(LargePages().copied(wide[:, ::2]), wide[:, ::2])


def test_what_does_not_fit_a_block_gets_one_of_its_own() -> None:
    pages = LargePages()
    first = pages.copied(torch.ones(3))
    large = pages.copied(torch.full((BLOCK_BYTES // 4 + 1,), 2.0))
    assert bool((large == 2.0).all())
    assert torch.equal(first, torch.ones(3))


def test_a_block_outlives_whoever_made_it() -> None:
    copied = LargePages().copied(torch.arange(1000.0))
    torch.empty(BLOCK_BYTES, dtype=torch.uint8).fill_(7)
    assert torch.equal(copied, torch.arange(1000.0))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this kernel gives no large pages",
)
def test_its_pages_are_large() -> None:
    def large() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages"))

    before = large()
    kept = LargePages().copied(torch.ones(8 * PAGE_BYTES // 4))
    assert large() - before >= 4 * PAGE_BYTES // 1024, kept.shape
