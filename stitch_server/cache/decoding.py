"""Attention of single new tokens over blocks, by compiled loops on a processor. Knows no session.

PyTorch's kernels want each past in one piece, so it has to be gathered first, and those of several sequences filled up
to one length. A loop reads keys and values where they lie, each sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from stitch_server.arrays import floats, numbers
from stitch_server.loops.attention import Past, attend, keep
from stitch_server.loops.numbers import Places


@dataclass(frozen=True, slots=True)
class Singles:
    """Rows of a batch that are a new token of some sequence each."""

    # Where they are in the batch.
    rows: slice | Tensor
    # As in `Past`.
    slots: Places
    bounds: Places
    window: int | None = None

    @classmethod
    def of(cls, rows: slice | Tensor, slots: Sequence[Tensor], window: int | None = None) -> Singles:
        """`slots` of each row's past and present."""
        bounds = np.array([0, *accumulate(len(one) for one in slots)])
        return cls(rows, torch.cat(list(slots)).numpy(), bounds, window)

    def attend(self, query: Tensor, pairs: Tensor, scale: float) -> Tensor:
        """query `[rows, heads, head_dim]` to what each sees, `[rows, heads * head_dim]`.

        `pairs` `[all slots, 2 * kv_heads, head_dim]` holds one layer's keys, then values.
        """
        mixed = np.empty(query.shape, np.float32)
        attend(floats(query), numbers(pairs), self.slots, self.bounds, self.window or 0, scale, mixed)
        return torch.from_numpy(mixed).flatten(1).to(query.dtype)


class SinglesAttention:
    """The `span.BatchAttend` of a batch of nothing but single tokens."""

    def __init__(self, pairs: Tensor, first: int, slots: Sequence[Tensor]) -> None:
        """`pairs` of all layers from `first` on, and the `slots` of each token's past and present."""
        self._pairs, self._first, self._slots = pairs, first, slots
        self._all = Singles.of(slice(None), slots)

    @property
    def past(self) -> Past:
        """As `span.BatchAttend` says."""
        return Past(self._first, numbers(self._pairs), self._all.slots, self._all.bounds)

    def first(self, segments: int) -> SinglesAttention:
        """As `span.BatchAttend` says."""
        return SinglesAttention(self._pairs, self._first, self._slots[:segments])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        pairs = self._pairs[layer - self._first]
        keep(floats(torch.cat([key, value], dim=1)), 0, numbers(pairs), self._all.slots, self._all.bounds)
        return replace(self._all, window=window).attend(query, pairs, scale)


def compile_for(pairs: Tensor) -> None:
    """Compiles what attends over `pairs` like these, so that the first token need not wait for it."""
    row, nowhere = torch.zeros(1, pairs.shape[2] // 2, pairs.shape[3]), [torch.zeros(1, dtype=torch.int64)]
    # Room of its own: those may have none.
    room = torch.zeros(1, 1, *pairs.shape[2:], dtype=pairs.dtype)
    SinglesAttention(room, 0, nowhere)(0, row, row, row, 1.0, None)
