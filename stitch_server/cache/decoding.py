"""Attention of single new tokens over blocks, compiled by Numba for a processor. Knows arrays, no session.

PyTorch's kernels want each past in one piece, so it has to be gathered first, and those of several sequences filled up
to one length. A loop reads keys and values where they lie, each sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stitch_server.cache.span import within
from stitch_server.compiling import compiled

Floats = NDArray[np.float32]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Singles:
    """Rows of a batch that are a new token of some sequence each; all tensors but the indices float32."""

    # Where they are in the batch.
    rows: slice | Tensor
    # Each one's past and present, one behind the other, and where each begins and the last ends.
    slots: Places
    bounds: Places

    @classmethod
    def of(cls, rows: slice | Tensor, slots: Sequence[Tensor]) -> Singles:
        """`slots` of each row."""
        bounds = np.array([0, *accumulate(len(one) for one in slots)])
        return cls(rows, torch.cat(list(slots)).numpy(), bounds)

    def attend(self, query: Tensor, pairs: Tensor, scale: float) -> Tensor:
        """query `[rows, heads, head_dim]` to what each sees, `[rows, heads * head_dim]`.

        `pairs` `[all slots, 2 * kv_heads, head_dim]` holds one layer's keys, then values.
        """
        none = query[:0]
        return self.extend(query, none, none, pairs, scale)

    def extend(self, query: Tensor, key: Tensor, value: Tensor, pairs: Tensor, scale: float) -> Tensor:
        """The same, once each row's key and value `[rows, kv_heads, head_dim]` are in the last of its slots."""
        mixed = np.empty(query.shape, np.float32)
        rows = _array(query), _array(key), _array(value)
        _extend(*rows, _array(pairs), self.slots, self.bounds, scale, mixed)
        return torch.from_numpy(mixed).flatten(1)


class SinglesAttention:
    """The `span.BatchAttend` of a batch of nothing but single tokens: all of them in one loop."""

    def __init__(self, pairs: Tensor, first: int, slots: Sequence[Tensor]) -> None:
        """`pairs` of all layers from `first` on, and the `slots` of each token's past and present."""
        self._pairs, self._first, self._slots = pairs, first, slots
        # By the layers' window.
        self._seen: dict[int | None, Singles] = {}

    def first(self, segments: int) -> SinglesAttention:
        """As `span.BatchAttend` says."""
        return SinglesAttention(self._pairs, self._first, self._slots[:segments])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        if window not in self._seen:
            self._seen[window] = Singles.of(slice(None), [within(slots, window) for slots in self._slots])
        return self._seen[window].extend(query, key, value, self._pairs[layer - self._first], scale)


def _array(heads: Tensor) -> Floats:
    array: Floats = heads.contiguous().numpy()
    return array


@compiled("void(f4[::1])")
def _soften(scores: Floats) -> None:
    """Softmax, in place."""
    largest = scores[0]
    for score in scores:
        largest = max(largest, score)
    total = np.float32(0)
    for place in range(scores.size):
        scores[place] = np.exp(scores[place] - largest)
        total += scores[place]
    for place in range(scores.size):
        scores[place] /= total


@compiled("void(f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], i8[::1], i8[::1], f4, f4[:, :, ::1])")
def _extend(
    query: Floats,
    new_keys: Floats,
    new_values: Floats,
    pairs: Floats,
    slots: Places,
    bounds: Places,
    scale: float,
    mixed: Floats,
) -> None:
    tokens, heads, head_dim = query.shape
    kv_heads = pairs.shape[1] // 2
    # The query heads that share a key, so that it is read once for all of them.
    group = heads // kv_heads
    weights = np.empty((group, len(slots)), np.float32)
    for token in range(len(new_keys)):
        new = slots[bounds[token + 1] - 1]
        for kv_head in range(kv_heads):
            for dimension in range(head_dim):
                pairs[new, kv_head, dimension] = new_keys[token, kv_head, dimension]
                pairs[new, kv_heads + kv_head, dimension] = new_values[token, kv_head, dimension]
    for token in range(tokens):
        seen = slots[bounds[token] : bounds[token + 1]]
        for kv_head in range(kv_heads):
            asked = query[token, kv_head * group : (kv_head + 1) * group]
            answers = mixed[token, kv_head * group : (kv_head + 1) * group]
            for place in range(seen.size):
                key = pairs[seen[place], kv_head]
                for member in range(group):
                    product = np.float32(0)
                    for dimension in range(head_dim):
                        product += asked[member, dimension] * key[dimension]
                    weights[member, place] = product * scale
            for member in range(group):
                _soften(weights[member, : seen.size])
            answers[:] = 0
            for place in range(seen.size):
                value = pairs[seen[place], kv_heads + kv_head]
                for member in range(group):
                    weight = weights[member, place]
                    for dimension in range(head_dim):
                        answers[member, dimension] += weight * value[dimension]
