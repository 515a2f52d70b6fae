"""Attention of a few tokens over their pasts, which are read in their blocks. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, Places, exponential, like, widened
from stitch_server.loops.tiles import LANES, SIDE, STRIP, blend, dots
from stitch_server.loops.together import MOST_QUERIES, attend_together


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
def keep(new: Floats, heads: int, pairs: Numbers, slots: Places, ends: Places) -> None:
    """Each row's keys and values, `new[:, heads:]` `[tokens, 2 * kv_heads, head_dim]`, to the last of its slots."""
    for token in range(len(new)):
        slot = slots[ends[token] - 1]
        for head in range(pairs.shape[1]):
            for dimension in range(pairs.shape[2]):
                pairs[slot, head, dimension] = like(pairs[slot, head, dimension], new[token, heads + head, dimension])


@compiled()
def attend(
    query: Floats,
    pairs: Numbers,
    slots: Places,
    begins: Places,
    ends: Places,
    window: int,
    scale: float,
    mixed: Floats,
) -> None:
    """What each row sees, `mixed` `[tokens, heads, head_dim]`; `query` may have more heads behind these."""
    heads, kv_heads = mixed.shape[1], pairs.shape[1] // 2
    # The query heads that share a key, so that it is read once for all of them.
    group = heads // kv_heads
    most = max(1, MOST_QUERIES // group)
    longest = 0
    for token in range(len(mixed)):
        longest = max(longest, ends[token] - begins[token])
    if window > 0:
        longest = min(longest, window)
    # Tiles may have more rows than a group has heads.
    weights = np.empty((heads + SIDE, longest), np.float32)
    answered = np.empty((heads + SIDE, mixed.shape[2]), np.float32)
    first = 0
    while first < len(mixed):
        after = first + 1
        while after < len(mixed) and begins[after] == begins[first] and after - first < most:
            after += 1
        begin = begins[first]
        if window > 0:
            begin = max(begin, ends[first] - window)
        seen = slots[begin : ends[after - 1]]
        if after == first + 1:
            _attend_alone(query[first], pairs, seen, scale, weights, answered, mixed[first])
        else:
            attend_together(
                query[first:after], pairs, seen, ends[first:after] - begin, window, scale, mixed[first:after]
            )
        first = after


@compiled()
def _attend_alone(
    query: Floats, pairs: Numbers, seen: Places, scale: float, weights: Floats, answered: Floats, mixed: Floats
) -> None:
    """One token, `[heads, head_dim]`, for which turning keys would not pay: behind 140, 11 µs instead of 21.

    `weights` and `answered` are room, here and below.
    """
    kv_heads = pairs.shape[1] // 2
    group = len(mixed) // kv_heads
    for kv_head in range(kv_heads):
        first, last = kv_head * group, (kv_head + 1) * group
        _score(query, first, last, pairs[:, kv_head], seen, scale, weights)
        for head in range(first, last):
            _soften(weights[head, : seen.size])
        _mix(weights, first, last, pairs[:, kv_heads + kv_head], seen, answered)
    mixed[:] = answered[: len(mixed)]


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
def _mix(weights: Floats, first: int, end: int, values: Numbers, seen: Places, mixed: Floats) -> None:
    """Sums of the values that are seen, for heads [first, end); some rows behind these are spoilt."""
    tiled = mixed.shape[1] - mixed.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for head in range(first, end, SIDE):
            blend(values, seen, at, weights, head, mixed[head : head + SIDE, at : at + STRIP])
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
