"""Attention of single tokens over their pasts, which are read in their blocks. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, Places, exponential, like, widened
from stitch_server.loops.tiles import LANES, SIDE, STRIP, blend, dots


class Past(NamedTuple):
    """Where single new tokens of some sequences, and all before them, lie in the cache."""

    # The first of its layers in the whole model.
    first: int
    # [layers, slots, 2 * kv_heads, head_dim]: a token's keys, then its values.
    pairs: Numbers
    # Each one's past and present, one behind the other, and where each begins and the last ends.
    slots: Places
    bounds: Places


@compiled()
def keep(new: Floats, heads: int, pairs: Numbers, slots: Places, bounds: Places) -> None:
    """Each row's keys and values, `new[:, heads:]` `[tokens, 2 * kv_heads, head_dim]`, to the last of its slots."""
    for token in range(len(new)):
        slot = slots[bounds[token + 1] - 1]
        for head in range(pairs.shape[1]):
            for dimension in range(pairs.shape[2]):
                pairs[slot, head, dimension] = like(pairs[slot, head, dimension], new[token, heads + head, dimension])


@compiled()
def attend(
    query: Floats, pairs: Numbers, slots: Places, bounds: Places, window: int, scale: float, mixed: Floats
) -> None:
    """What each row sees, `mixed` `[tokens, heads, head_dim]`; `query` may have more heads behind these."""
    heads, kv_heads = mixed.shape[1], pairs.shape[1] // 2
    # The query heads that share a key, so that it is read once for all of them.
    group = heads // kv_heads
    longest = 0
    for token in range(len(mixed)):
        longest = max(longest, bounds[token + 1] - bounds[token])
    if window > 0:
        longest = min(longest, window)
    # Tiles may have more rows than a group has heads.
    weights, strip = np.empty((heads + SIDE, longest), np.float32), np.empty((SIDE, STRIP), np.float32)
    for token in range(len(mixed)):
        begin, end = bounds[token], bounds[token + 1]
        if window > 0:
            begin = max(begin, end - window)
        seen = slots[begin:end]
        for kv_head in range(kv_heads):
            first, last = kv_head * group, (kv_head + 1) * group
            _score(query[token], first, last, pairs[:, kv_head], seen, scale, weights)
            for head in range(first, last):
                _soften(weights[head, : seen.size])
            _mix(weights, first, last, pairs[:, kv_heads + kv_head], seen, strip, mixed[token])


@compiled()
def _score(query: Floats, first: int, end: int, keys: Numbers, seen: Places, scale: float, scores: Floats) -> None:
    """What `scores` query heads [first, end) have for each token that is seen."""
    tiled = len(query) >= SIDE and query.shape[1] % LANES == 0
    for begin in range(0, seen.size, SIDE):
        after = min(begin + SIDE, seen.size)
        # Most tokens lie next to those before them.
        if tiled and after - begin == SIDE and seen[after - 1] - seen[begin] == SIDE - 1:
            for head in range(first, end, SIDE):
                row = min(head, len(query) - SIDE)
                sums = dots(keys, seen[begin], query, row)
                for place in range(begin, after):
                    for member in range(head, min(head + SIDE, end)):
                        at = SIDE * (place - begin) + member - row
                        scores[member, place] = sums[at] * np.float32(scale)
        else:
            for place in range(begin, after):
                for head in range(first, end):
                    product = np.float32(0)
                    for dimension in range(query.shape[1]):
                        product += query[head, dimension] * widened(keys[seen[place], dimension])
                    scores[head, place] = product * np.float32(scale)


@compiled()
def _mix(weights: Floats, first: int, end: int, values: Numbers, seen: Places, strip: Floats, mixed: Floats) -> None:
    """Sums of the values that are seen, for heads [first, end); `strip` is room for a part of them."""
    tiled = mixed.shape[1] - mixed.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for head in range(first, end, SIDE):
            blend(values, seen, at, weights, head, strip)
            for member in range(head, min(head + SIDE, end)):
                mixed[member, at : at + STRIP] = strip[member - head]
    for head in range(first, end):
        mixed[head, tiled:] = 0
        for place in range(seen.size):
            weight = weights[head, place]
            for dimension in range(tiled, mixed.shape[1]):
                mixed[head, dimension] += weight * widened(values[seen[place], dimension])


@compiled()
def _soften(scores: Floats) -> None:
    """Softmax, in place."""
    largest = scores[0]
    for score in scores:
        largest = max(largest, score)
    total = np.float32(0)
    for place in range(scores.size):
        scores[place] = exponential(scores[place] - largest)
        total += scores[place]
    for place in range(scores.size):
        scores[place] /= total
