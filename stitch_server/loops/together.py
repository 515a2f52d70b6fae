"""Attention of consecutive tokens of one sequence, which see almost the same. Knows arrays alone.

The past goes by once, part by part, for all heads and tokens: what a part's tokens add to the mean is corrected when a
later score is larger than all before it, as in https://arxiv.org/abs/1805.02867 and https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.dots import SIDE, STRIP, blend, fetched
from stitch_server.loops.numbers import Floats, Numbers, Places, exponential, widened
from stitch_server.loops.softmax import largest, shares
from stitch_server.loops.vectors import CACHE_LINE

# Queries, tokens times heads of a group, that go together: a second cache has room for what they are and become.
MOST_QUERIES = 96
# Tokens of the past in a part, which has room there, too, and the next one beside it.
PART = 4 * STRIP


@compiled()
def attend_together(
    query: Floats,
    pairs: Numbers,
    seen: Places,
    lengths: Places,
    first: int,
    end: int,
    window: int,
    scale: float,
    mixed: Floats,
) -> None:
    """What each of the tokens sees, `mixed` `[tokens, heads, head_dim]`; `query` may have more heads behind these.

    Of all heads it takes those that share keys [first, end).
    Of the slots that are `seen` a token sees as many as its length says, or the last of these that a window leaves.
    """
    kv_heads, head_dim = pairs.shape[1] // 2, mixed.shape[2]
    group = mixed.shape[1] // kv_heads
    count = len(mixed) * group
    # By group: the queries of all its heads, so that each key is read once for all of them. Tiles may have more rows.
    asked = np.zeros((kv_heads, count + SIDE, head_dim), np.float32)
    sums = np.zeros((kv_heads, count + SIDE, head_dim), np.float32)
    tops = np.full((kv_heads, count), -np.inf, np.float32)
    totals = np.zeros((kv_heads, count), np.float32)
    for kv_head in range(first, end):
        for one in range(count):
            token, head = one // group, kv_head * group + one % group
            for dimension in range(head_dim):
                asked[kv_head, one, dimension] = query[token, head, dimension] * np.float32(scale)
    scores = np.empty((count + SIDE, PART), np.float32)
    turned = np.empty((head_dim, STRIP), np.float32)
    strip = np.empty((SIDE, STRIP), np.float32)
    dimensions = np.arange(head_dim)
    for begin in range(0, seen.size, PART):
        part, later = seen[begin : begin + PART], seen[begin + PART : begin + 2 * PART]
        for kv_head in range(first, end):
            keys, values = pairs[:, kv_head], pairs[:, kv_heads + kv_head]
            fetch(keys, later)
            fetch(values, later)
            _score(asked[kv_head], count, keys, part, turned, dimensions, scores)
            for one in range(count):
                length = lengths[one // group] - begin
                low = max(0, length - window) if window > 0 else 0
                high = min(max(low, length), part.size)
                scores[one, : min(low, part.size)] = 0
                scores[one, high : part.size] = 0
                if low < high:
                    _soften(scores[one, low:high], tops[kv_head], totals[kv_head], one, sums[kv_head])
            _add(scores, count, values, part, strip, sums[kv_head])
    for kv_head in range(first, end):
        for one in range(count):
            token, head = one // group, kv_head * group + one % group
            for dimension in range(head_dim):
                mixed[token, head, dimension] = sums[kv_head, one, dimension] / totals[kv_head, one]


@compiled()
def fetch(rows: Numbers, slots: Places) -> None:
    """Asks for these rows to be in the second cache soon."""
    for place in range(slots.size):
        for dimension in range(0, rows.shape[1], CACHE_LINE // rows.itemsize):
            fetched(rows, slots[place], dimension)


@compiled()
def _score(
    asked: Floats, count: int, keys: Numbers, part: Places, turned: Floats, dimensions: Places, scores: Floats
) -> None:
    """What `count` queries score for each token of the part; keys are turned, so that sums need no folding."""
    for begin in range(0, part.size, STRIP):
        filled = min(STRIP, part.size - begin)
        turned[:, filled:] = 0
        for place in range(filled):
            slot = part[begin + place]
            for dimension in range(len(turned)):
                turned[dimension, place] = widened(keys[slot, dimension])
        for first in range(0, count, SIDE):
            blend(turned, dimensions, 0, asked, first, scores[first : first + SIDE, begin : begin + STRIP])


@compiled()
def _soften(scores: Floats, tops: Floats, totals: Floats, one: int, sums: Floats) -> None:
    """Scores to shares, in place, of a softmax whose largest score so far may be one of these."""
    now = largest(scores, tops[one])
    correction = exponential(tops[one] - now)
    total = totals[one] * correction + shares(scores, now)
    for dimension in range(sums.shape[1]):
        sums[one, dimension] *= correction
    tops[one], totals[one] = now, total


@compiled()
def _add(shares: Floats, count: int, values: Numbers, part: Places, strip: Floats, sums: Floats) -> None:
    """The part's values to `count` sums; some rows behind these are spoilt."""
    tiled = sums.shape[1] - sums.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for first in range(0, count, SIDE):
            blend(values, part, at, shares, first, strip)
            for row in range(SIDE):
                for place in range(STRIP):
                    sums[first + row, at + place] += strip[row, place]
    for one in range(count):
        for place in range(part.size):
            for dimension in range(tiled, sums.shape[1]):
                sums[one, dimension] += shares[one, place] * widened(values[part[place], dimension])
