"""Memory for kernels. Knows nothing of what is in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.vectors import CACHE_LINE


@compiled()
def cache_aligned(size: int) -> NDArray[np.uint8]:
    """So many bytes, aligned to a cache line: tile rows that span two lines load four times as slowly."""
    room = np.empty(size + CACHE_LINE, np.uint8)
    skipped = -room.ctypes.data % CACHE_LINE
    return room[skipped : skipped + size]
