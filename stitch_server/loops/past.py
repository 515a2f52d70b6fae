"""Where tokens of some sequences lie in the cache, as loops take it. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Numbers, Places


class Past(NamedTuple):
    """Where new tokens of some sequences, and all before them, lie in the cache."""

    # The first of its layers in the whole model.
    first: int
    # [layers, slots, 2 * kv_heads, head_dim]: a token's keys, then its values.
    pairs: Numbers
    # Sequences' slots, past and present, one sequence behind the other.
    slots: Places
    # Which of them each token sees, the last of which is its own. Neighbours that see the same first one are
    # consecutive tokens of one sequence.
    begins: Places
    ends: Places


@compiled()
def places_of(spans: Places, blocks: Places, block_tokens: int) -> tuple[Places, Places, Places]:
    """The slots, begins and ends of a `Past`.

    `spans`: how many tokens each sequence has, and how many of these are new, `[sequences, 2]`. Their blocks lie one
    sequence's behind the other's, no more than it fills.
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
