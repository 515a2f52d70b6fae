"""Memory in huge pages, for weights and KV caches that are read from one end to the other.

`HugePageArena` returns CPU tensors that lie in 2 MB pages if the operating system has some: hardware prefetch stops at
the end of a page, which by default is 4 KB. An arena's block is unmapped when the last of its tensors is freed.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
# The size of a block that several small tensors share.
BLOCK_BYTES = 64 << 20
# A cache line, and the width of an AVX-512 register.
ALIGNMENT_BYTES = 64


class HugePageArena:
    """Allocates CPU tensors one after the other in blocks of huge pages."""

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
