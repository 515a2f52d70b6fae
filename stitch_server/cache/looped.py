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
from stitch_server.loops.attention import attend_shared, keep_all
from stitch_server.loops.numbers import Numbers
from stitch_server.loops.past import Past, places_of
from stitch_server.processor import has_tiles


class LoopAttention:
    """The `span.BatchAttend` of a batch on a processor."""

    def __init__(self, pairs: Numbers, first: int, block_tokens: int, spans: Sequence[Span]) -> None:
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
        spans = np.array([(span.end, span.length) for span in self._spans], np.int64).reshape(-1, 2)
        filled = [span.blocks[: -(-span.end // self._block_tokens)] for span in self._spans]
        blocks = np.array([block for one in filled for block in one], np.int64)
        return Past(self._first, self._pairs, *places_of(spans, blocks, self._block_tokens))


def compiled_for(pairs: Tensor) -> Numbers:
    """`pairs` as loops read them. Compiles what attends over them, so that the first token need not wait for it."""
    row = torch.zeros(1, pairs.shape[2] // 2, pairs.shape[3])
    # Room of its own: those may have none.
    room = torch.zeros(1, 1, *pairs.shape[2:], dtype=pairs.dtype)
    LoopAttention(numbers(room), 0, 1, [Span(0, 1, [0])])(0, row, row, row, 1.0, None)
    return numbers(pairs)
