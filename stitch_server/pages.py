"""Memory in large pages for what is read from one end to the other. Doesn't know what it holds."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
# Where several tensors lie side by side.
BLOCK_BYTES = 64 << 20
# What vector registers like to be loaded from.
ALIGNMENT_BYTES = 64


class LargePages:
    """Room for tensors in pages of 2 MB, where the kernel has some: a prefetch stops at the end of a page of 4 KB.

    A block goes back when the last of its tensors does.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the processor, not filled."""
        used = math.prod(shape) * dtype.itemsize
        size = -(-used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if size > len(self._free):
            self._free = _block(max(size, BLOCK_BYTES))
        room, self._free = self._free[:used], self._free[size:]
        return room.view(dtype).view(shape)

    def copied(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, on the processor."""
        return self.room(tensor.shape, tensor.dtype).copy_(tensor)


def _block(size: int) -> Tensor:
    """At least `size` bytes, none of them touched yet."""
    # Private: pages that processes could share are small ones.
    memory = mmap.mmap(-1, size + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % PAGE_BYTES :]
