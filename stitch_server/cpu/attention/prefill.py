"""Prefill attention: consecutive tokens of one sequence, in vector registers. Knows arrays alone.

The past is read once, part by part, for all heads and tokens, with an online softmax
(https://arxiv.org/abs/1805.02867) as in FlashAttention (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import numpy as np

from stitch_server.cpu.attention.register_tiles import SIDE, STRIP, prefetch_element, weighted_sums
from stitch_server.cpu.attention.softmax import exponentiate, largest
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Floats, Indices, Numbers, exponential, widened
from stitch_server.cpu.vectors import CACHE_LINE

# Queries, tokens times heads of a group, of one call: they and their sums fit into the L2 cache.
MOST_QUERIES = 96
# Tokens of the past in a part; it and the next one fit there, too.
PART = 4 * STRIP


@compiled()
def attend_prefill(
    query: Floats,
    kv: Numbers,
    visible: Indices,
    lengths: Indices,
    first: int,
    end: int,
    window: int,
    scale: float,
    attended: Floats,
) -> None:
    """Causal attention into `attended` `[tokens, heads, head_dim]`; `query` may have more heads behind these.

    Computes KV heads [first, end). `visible`: the slots of all that any token sees; token t sees the first
    `lengths[t]`, or with a `window` the last so many of these.
    """
    kv_heads, head_dim = kv.shape[1] // 2, attended.shape[2]
    group = attended.shape[1] // kv_heads
    count = len(attended) * group
    # By KV head: the queries of its whole group, so that each key is read once. Register tiles may have more rows.
    queries = np.zeros((kv_heads, count + SIDE, head_dim), np.float32)
    sums = np.zeros((kv_heads, count + SIDE, head_dim), np.float32)
    row_maxima = np.full((kv_heads, count), -np.inf, np.float32)
    row_sums = np.zeros((kv_heads, count), np.float32)
    for kv_head in range(first, end):
        for one in range(count):
            token, head = one // group, kv_head * group + one % group
            for dimension in range(head_dim):
                queries[kv_head, one, dimension] = query[token, head, dimension] * np.float32(scale)
    scores = np.empty((count + SIDE, PART), np.float32)
    transposed = np.empty((head_dim, STRIP), np.float32)
    strip = np.empty((SIDE, STRIP), np.float32)
    dimensions = np.arange(head_dim)
    for begin in range(0, visible.size, PART):
        part, later = visible[begin : begin + PART], visible[begin + PART : begin + 2 * PART]
        for kv_head in range(first, end):
            keys, values = kv[:, kv_head], kv[:, kv_heads + kv_head]
            prefetch_rows(keys, later)
            prefetch_rows(values, later)
            _score(queries[kv_head], count, keys, part, transposed, dimensions, scores)
            for one in range(count):
                length = lengths[one // group] - begin
                low = max(0, length - window) if window > 0 else 0
                high = min(max(low, length), part.size)
                scores[one, : min(low, part.size)] = 0
                scores[one, high : part.size] = 0
                if low < high:
                    _online_softmax(scores[one, low:high], row_maxima[kv_head], row_sums[kv_head], one, sums[kv_head])
            _add_values(scores, count, values, part, strip, sums[kv_head])
    for kv_head in range(first, end):
        for one in range(count):
            token, head = one // group, kv_head * group + one % group
            for dimension in range(head_dim):
                attended[token, head, dimension] = sums[kv_head, one, dimension] / row_sums[kv_head, one]


@compiled()
def prefetch_rows(rows: Numbers, slots: Indices) -> None:
    """Prefetches these rows into the L2 cache."""
    for place in range(slots.size):
        for dimension in range(0, rows.shape[1], CACHE_LINE // rows.itemsize):
            prefetch_element(rows, slots[place], dimension)


@compiled()
def _score(
    queries: Floats, count: int, keys: Numbers, part: Indices, transposed: Floats, dimensions: Indices, scores: Floats
) -> None:
    """Scores of `count` queries for each token of the part; keys are transposed, which spares horizontal sums."""
    for begin in range(0, part.size, STRIP):
        filled = min(STRIP, part.size - begin)
        transposed[:, filled:] = 0
        for place in range(filled):
            slot = part[begin + place]
            for dimension in range(len(transposed)):
                transposed[dimension, place] = widened(keys[slot, dimension])
        for first in range(0, count, SIDE):
            weighted_sums(
                transposed, dimensions, 0, queries, first, scores[first : first + SIDE, begin : begin + STRIP]
            )


@compiled()
def _online_softmax(scores: Floats, row_maxima: Floats, row_sums: Floats, one: int, sums: Floats) -> None:
    """One step of the online softmax: scores become weights in place, and earlier sums are rescaled."""
    now = largest(scores, row_maxima[one])
    correction = exponential(row_maxima[one] - now)
    total = row_sums[one] * correction + exponentiate(scores, now)
    for dimension in range(sums.shape[1]):
        sums[one, dimension] *= correction
    row_maxima[one], row_sums[one] = now, total


@compiled()
def _add_values(weights: Floats, count: int, values: Numbers, part: Indices, strip: Floats, sums: Floats) -> None:
    """Adds the part's weighted values to `count` sums; overwrites some rows behind these."""
    tiled = sums.shape[1] - sums.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for first in range(0, count, SIDE):
            weighted_sums(values, part, at, weights, first, strip)
            for row in range(SIDE):
                for place in range(STRIP):
                    sums[first + row, at + place] += strip[row, place]
    for one in range(count):
        for place in range(part.size):
            for dimension in range(tiled, sums.shape[1]):
                sums[one, dimension] += weights[one, place] * widened(values[part[place], dimension])
