"""Attention of a few tokens over their pasts, which are read in their blocks. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, Places, exponential, like, widened
from stitch_server.loops.tiles import LANES, SIDE, STRIP, blend, dots

# Queries, tokens times heads of a group, whose scores are kept at once: a second cache has room for them.
MOST_QUERIES = 96


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
        seen = ends[token] - begins[token]
        longest = max(longest, seen if window == 0 else min(seen, window + most))
    # Tiles may have more rows than a group has heads, and more places than there are tokens.
    weights = np.empty((max(heads, most * group) + SIDE, longest + STRIP), np.float32)
    answered = np.empty((max(heads, most * group) + SIDE, mixed.shape[2]), np.float32)
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
            lengths = ends[first:after] - begin
            asked, given = query[first:after], mixed[first:after]
            _attend_together(asked, pairs, seen, lengths, window, scale, weights, answered, given)
        first = after


@compiled()
def _attend_alone(
    query: Floats, pairs: Numbers, seen: Places, scale: float, weights: Floats, answered: Floats, mixed: Floats
) -> None:
    """One token, `[heads, head_dim]`; `weights` and `answered` are room, here and below."""
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
def _attend_together(
    query: Floats,
    pairs: Numbers,
    seen: Places,
    lengths: Places,
    window: int,
    scale: float,
    weights: Floats,
    answered: Floats,
    mixed: Floats,
) -> None:
    """Consecutive tokens of one sequence, `[tokens, heads, head_dim]`, of which each sees so many or its window's."""
    kv_heads, head_dim = pairs.shape[1] // 2, mixed.shape[2]
    group = mixed.shape[1] // kv_heads
    count = len(mixed) * group
    # All queries of a group's heads, so that each key is read once for all of them.
    asked = np.zeros((count + SIDE, head_dim), np.float32)
    turned = np.empty((head_dim, STRIP), np.float32)
    dimensions = np.arange(head_dim)
    for kv_head in range(kv_heads):
        for token in range(len(mixed)):
            for member in range(group):
                asked[token * group + member] = query[token, kv_head * group + member] * np.float32(scale)
        _score_all(asked, count, pairs[:, kv_head], seen, turned, dimensions, weights)
        for token in range(len(mixed)):
            low = max(0, lengths[token] - window) if window > 0 else 0
            for one in range(token * group, (token + 1) * group):
                _soften(weights[one, low : lengths[token]])
                weights[one, :low] = 0
                weights[one, lengths[token] : seen.size] = 0
        _mix(weights, 0, count, pairs[:, kv_heads + kv_head], seen, answered)
        for token in range(len(mixed)):
            for member in range(group):
                mixed[token, kv_head * group + member] = answered[token * group + member]


@compiled()
def _score_all(
    asked: Floats, count: int, keys: Numbers, seen: Places, turned: Floats, dimensions: Places, scores: Floats
) -> None:
    """What `count` queries score for each token that is seen; keys are turned, so that sums need no folding."""
    for begin in range(0, seen.size, STRIP):
        filled = min(STRIP, seen.size - begin)
        turned[:, filled:] = 0
        for place in range(filled):
            slot = seen[begin + place]
            for dimension in range(len(turned)):
                turned[dimension, place] = widened(keys[slot, dimension])
        for first in range(0, count, SIDE):
            blend(turned, dimensions, 0, asked, first, scores[first : first + SIDE, begin : begin + STRIP])


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
