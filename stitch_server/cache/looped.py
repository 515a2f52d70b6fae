"""Attention over blocks by compiled loops, on threads of a processor. Knows no session.

PyTorch's kernels want each past in one piece, so it has to be gathered first, and those of several sequences filled up
to one length. A loop reads keys and values where they lie, each sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stitch_server.arrays import floats, numbers
from stitch_server.cache.span import Span
from stitch_server.crew import together
from stitch_server.loops.attention import Past, attend_shared, keep_all
from stitch_server.loops.numbers import Places
from stitch_server.processor import has_tiles


class LoopAttention:
    """The `span.BatchAttend` of a batch on a processor."""

    def __init__(self, pairs: Tensor, first: int, block_tokens: int, spans: Sequence[Span]) -> None:
        """`pairs` of all layers from `first` on, as in `Past`."""
        self._pairs, self._first, self._block_tokens, self._spans = pairs, first, block_tokens, spans
        self.past = self._past()

    def first(self, segments: int) -> LoopAttention:
        """As `span.BatchAttend` says."""
        return LoopAttention(self._pairs, self._first, self._block_tokens, self._spans[:segments])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        pairs = self.past.pairs[layer - self._first]
        keep_all(floats(torch.cat([key, value], dim=1)), pairs, self.past)
        asked, mixed = floats(query), np.empty(query.shape, np.float32)
        together(partial(attend_shared, asked, self.past, pairs, window or 0, scale, mixed, has_tiles()))
        return torch.from_numpy(mixed).flatten(1).to(query.dtype)

    def _past(self) -> Past:
        # Not PyTorch's arrays: each of their operations costs a single token some microseconds.
        slots = [_slots(span, self._block_tokens) for span in self._spans]
        begins: list[Places] = []
        ends: list[Places] = []
        begin = 0
        for span in self._spans:
            begins.append(np.full(span.length, begin))
            ends.append(np.arange(span.position, span.end) + begin + 1)
            begin += span.end
        return Past(self._first, numbers(self._pairs), _joined(slots), _joined(begins), _joined(ends))


def _slots(span: Span, block_tokens: int) -> Places:
    """As `span.slots_of`."""
    slots: Places = np.add.outer(np.array(span.blocks) * block_tokens, np.arange(block_tokens)).ravel()
    return slots[: span.end]


def _joined(parts: Sequence[Places]) -> Places:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def compile_for(pairs: Tensor) -> None:
    """Compiles what attends over `pairs` like these, so that the first token need not wait for it."""
    row = torch.zeros(1, pairs.shape[2] // 2, pairs.shape[3])
    # Room of its own: those may have none.
    room = torch.zeros(1, 1, *pairs.shape[2:], dtype=pairs.dtype)
    LoopAttention(room, 0, 1, [Span(0, 1, [0])])(0, row, row, row, 1.0, None)
