"""The device is picked or refused before anything is loaded; its memory, arrays and threads serve CPU kernels."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from stitch.errors import InvalidRequest
from stitch_server import devices
from stitch_server.devices import (
    ALIGNMENT_BYTES,
    BLOCK_BYTES,
    PAGE_BYTES,
    HugePageArena,
    as_bits,
    as_float32,
    pick_device,
    run_on_thread_pool,
    to_device_async,
)


def test_auto_picks_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device("auto").type == wanted


def test_missing_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match=r"compute\.device is 'cuda:1', but this machine has no GPU"):
        pick_device("cuda:1")
    assert pick_device("cpu").type == "cpu"


def test_tensor_for_the_cpu_is_not_copied() -> None:
    positions = torch.arange(3)
    assert to_device_async(positions, torch.device("cpu")) is positions


def test_bits_of_bfloat16_share_its_memory_as_uint16() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    bits = as_bits(tensor)
    assert bits.dtype == np.uint16
    bits[1] = 0
    assert tensor.tolist() == [1.0, 0.0, 1.0]


def test_float32_array_is_contiguous_and_copied_only_when_needed() -> None:
    tensor = torch.randn(4, 6)
    assert np.shares_memory(as_float32(tensor), tensor.numpy())
    strided = as_float32(tensor.bfloat16()[:, ::2])
    assert (strided.dtype, strided.flags.c_contiguous, strided.shape) == (np.float32, True, (4, 3))


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


def test_kernel_runs_on_as_many_threads_as_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    barrier, calls = threading.Barrier(3, timeout=10), list[int]()

    def kernel(threads: int, counts: object) -> None:
        calls.append(threads)
        barrier.wait()

    monkeypatch.setattr(devices, "_helpers", ThreadPoolExecutor(2))
    run_on_thread_pool(kernel)
    assert calls == [3, 3, 3]
