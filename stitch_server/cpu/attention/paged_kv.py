"""The KV cache as kernels read it: which slots a batch's tokens are in. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Indices, Numbers


class PagedKV(NamedTuple):
    """The KV cache, and where a batch's new tokens and all before them lie in it."""

    # The index of its first layer in the whole model.
    first: int
    # [layers, slots, 2 * kv_heads, head_dim]: a token's keys, then its values.
    kv: Numbers
    # The slots of all sequences, oldest token first, one sequence behind the other.
    slots: Indices
    # Token t sees slots[begins[t] : ends[t]], of which the last is its own. Neighbours with the same begin are
    # consecutive tokens of one sequence.
    begins: Indices
    ends: Indices


@compiled()
def slot_mapping(spans: Indices, blocks: Indices, block_tokens: int) -> tuple[Indices, Indices, Indices]:
    """The slots, begins and ends of a `PagedKV`.

    `spans` `[sequences, 2]`: how many tokens a sequence has, and how many of these are new. `blocks`: those that each
    sequence fills, one sequence behind the other.
    """
    slots = np.empty(np.sum(spans[:, 0]), np.int64)
    begins, ends = np.empty(np.sum(spans[:, 1]), np.int64), np.empty(np.sum(spans[:, 1]), np.int64)
    begin = token = block = 0
    for sequence in range(len(spans)):
        length, new = spans[sequence, 0], spans[sequence, 1]
        for place in range(length):
            slots[begin + place] = blocks[block + place // block_tokens] * block_tokens + place % block_tokens
        for place in range(length - new, length):
            begins[token], ends[token] = begin, begin + place + 1
            token += 1
        begin += length
        block += -(-length // block_tokens)
    return slots, begins, ends
