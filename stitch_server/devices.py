"""The device of a shard, and what it offers: transfers, arrays for CPU kernels, huge pages, threads.

`pick_device` turns `compute.device` of the cluster file into a torch device. `to_device_async` copies small host
tensors without synchronizing. On a CPU, `as_bits` and `as_float32` give tensors as the NumPy arrays that kernels read,
`HugePageArena` allocates memory for weights and KV caches, and `run_on_thread_pool` runs a kernel on several threads.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stitch.errors import InvalidRequest
from stitch_server import cpu

if TYPE_CHECKING:
    from stitch_server.cpu import Floats, Indices, Numbers

PAGE_BYTES = 2 << 20
# The size of a block that several small tensors share.
BLOCK_BYTES = 64 << 20
# A cache line, and the width of an AVX-512 register.
ALIGNMENT_BYTES = 64

# As many threads as the process has CPUs, so that the helpers of one kernel call never wait for each other.
_helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")


def pick_device(wanted: str) -> torch.device:
    """The device named `wanted`; `auto` is the first GPU if the machine has one, else the CPU.

    Raises InvalidRequest if `wanted` is a GPU and torch finds none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("compute.device", wanted, "this machine has no GPU that torch can use")
    return device


def is_device_fault(error: Exception) -> bool:
    """Whether a GPU has failed for good: every later call of this process fails as well."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def to_device_async(host: Tensor, device: torch.device) -> Tensor:
    """Copies `host` to the device without waiting for the kernels that are queued there.

    From memory that isn't pinned the driver of a GPU would wait.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def as_float32(tensor: Tensor) -> Floats:
    """A CPU tensor as a contiguous float32 array; shares memory if it is one already."""
    array: Floats = tensor.float().contiguous().numpy()
    return array


def as_bits(tensor: Tensor) -> Numbers:
    """A CPU tensor as an array over the same memory; bfloat16 becomes uint16, since NumPy has no such type."""
    array: Numbers = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class HugePageArena:
    """Allocates CPU tensors one after the other in blocks of 2 MB pages, if the operating system has some.

    Hardware prefetch stops at the end of a page, which by default is 4 KB. A block is unmapped when the last of its
    tensors is freed.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous uninitialized tensor."""
        used = math.prod(shape) * dtype.itemsize
        size = -(-used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if size > len(self._free):
            self._free = _map_block(max(size, BLOCK_BYTES))
        memory, self._free = self._free[:used], self._free[size:]
        return memory.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor`."""
        return self.allocate(tensor.shape, tensor.dtype).copy_(tensor)


def _map_block(size: int) -> Tensor:
    """At least `size` bytes, none of them touched yet."""
    # Private, since shared anonymous mappings get small pages.
    memory = mmap.mmap(-1, size + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % PAGE_BYTES :]


def run_on_thread_pool(kernel: Callable[[int, Indices], None]) -> None:
    """Calls `kernel(threads, task_counts)` on `torch.get_num_threads()` threads, the caller's included.

    Returns when the caller's own call does, which is after the last task. A helper that starts later finds no task.
    """
    threads, counts = torch.get_num_threads(), cpu.new_task_counts()
    for _ in range(threads - 1):
        _helpers.submit(kernel, threads, counts)
    kernel(threads, counts)
