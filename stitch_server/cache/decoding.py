"""Attention of single new tokens over blocks, compiled by Numba for a processor. Knows arrays, no session.

PyTorch's kernels want each past in one piece, so it has to be gathered first, and those of several sequences filled up
to one length. A loop reads keys and values where they lie, each sequence's own.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stitch_server.compiling import compiled

Floats = NDArray[np.float32]
Places = NDArray[np.int64]


def attend(query: Tensor, pairs: Tensor, slots: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """What each of several tokens sees: `[tokens, heads, head_dim]` in, `[tokens, heads * head_dim]` out, float32.

    `pairs` `[all slots, 2 * kv_heads, head_dim]` holds keys, then values; token n sees
    `slots[bounds[n]:bounds[n + 1]]` of them.
    """
    tokens, heads, head_dim = query.shape
    mixed = torch.empty(tokens, heads * head_dim)
    _attend(
        query.contiguous().numpy(),
        pairs.numpy(),
        slots.numpy(),
        bounds.numpy(),
        scale,
        mixed.view(tokens, heads, head_dim).numpy(),
    )
    return mixed


@compiled("void(f4[:, :, ::1], f4[:, :, ::1], i8[::1], i8[::1], f4, f4[:, :, ::1])")
def _attend(query: Floats, pairs: Floats, slots: Places, bounds: Places, scale: float, mixed: Floats) -> None:
    tokens, heads, head_dim = query.shape
    kv_heads = pairs.shape[1] // 2
    # The query heads that share a key, so that it is read once for all of them.
    group = heads // kv_heads
    weights = np.empty((group, np.max(bounds[1:] - bounds[:-1])), np.float32)
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
                scores = weights[member, : seen.size]
                scores[:] = np.exp(scores - np.max(scores))
                scores /= np.sum(scores)
            answers[:] = 0
            for place in range(seen.size):
                value = pairs[seen[place], kv_heads + kv_head]
                for member in range(group):
                    weight = weights[member, place]
                    for dimension in range(head_dim):
                        answers[member, dimension] += weight * value[dimension]
