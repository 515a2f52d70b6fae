"""Paged attention by compiled kernels, on threads of a processor. Knows no session.

PyTorch's kernels want each past in one piece, so it has to be gathered first, and those of several sequences filled up
to one length. A kernel reads keys and values where they lie, each sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stitch_server.cpu.attention.dispatch import attend_shared, store_all
from stitch_server.cpu.attention.paged_kv import PagedKV, slot_mapping
from stitch_server.cpu.features import has_tiles
from stitch_server.cpu.scalars import Numbers
from stitch_server.devices import as_bits, as_float32
from stitch_server.kv_cache.span import Span
from stitch_server.thread_pool import run_on_thread_pool


class CompiledAttention:
    """The `span.BatchAttend` of a batch on a processor."""

    def __init__(self, kv: Numbers, first: int, block_tokens: int, spans: Sequence[Span]) -> None:
        """`kv` of all layers from `first` on, as in `PagedKV`."""
        self._kv, self._first, self._block_tokens, self._spans = kv, first, block_tokens, spans
        self.paged = self._paged()

    def first(self, segments: int) -> CompiledAttention:
        """As `span.BatchAttend` says."""
        return CompiledAttention(self._kv, self._first, self._block_tokens, self._spans[:segments])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        kv = self.paged.kv[layer - self._first]
        store_all(as_float32(torch.cat([key, value], dim=1)), kv, self.paged)
        queries, attended = as_float32(query), np.empty(query.shape, np.float32)
        run_on_thread_pool(partial(attend_shared, queries, self.paged, kv, window or 0, scale, attended, has_tiles()))
        return torch.from_numpy(attended).flatten(1).to(query.dtype)

    def _paged(self) -> PagedKV:
        spans = np.array([(span.end, span.length) for span in self._spans], np.int64).reshape(-1, 2)
        filled = [span.blocks[: -(-span.end // self._block_tokens)] for span in self._spans]
        blocks = np.array([block for one in filled for block in one], np.int64)
        return PagedKV(self._first, self._kv, *slot_mapping(spans, blocks, self._block_tokens))


def compiled_for(kv: Tensor) -> Numbers:
    """`kv` as kernels read them. Compiles what attends over them, so that the first token need not wait for it."""
    row = torch.zeros(1, kv.shape[2] // 2, kv.shape[3])
    # Room of its own: those may have none.
    room = torch.zeros(1, 1, *kv.shape[2:], dtype=kv.dtype)
    CompiledAttention(as_bits(room), 0, 1, [Span(0, 1, [0])])(0, row, row, row, 1.0, None)
    return as_bits(kv)
