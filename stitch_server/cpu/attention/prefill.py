"""Prefill attention of consecutive tokens of one sequence, in vector registers.

The context is read once, one key tile at a time, for all heads and tokens, with an online softmax
(https://arxiv.org/abs/1805.02867) as in FlashAttention (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import numpy as np

from stitch_server.cpu.attention.register_tiles import STRIP, TILE_SIDE, prefetch_element, weighted_sums
from stitch_server.cpu.attention.softmax import exponentiate, largest
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Floats, Indices, Numbers, exponential, load_as_float32
from stitch_server.cpu.simd import CACHE_LINE

# Queries, tokens times heads of a group, of one call: they and their sums fit into the L2 cache.
MAX_QUERIES = 96
# Tokens of the context in a key tile; it and the next one fit there, too.
KEY_TILE = 4 * STRIP


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
    """Causal attention into `attended` `[tokens, heads, head_dim]`; `query` may have more heads after these.

    Computes KV heads [first, end). `visible`: the slots that any token attends to; token t attends to the first
    `lengths[t]`, or to the last `window` of these.
    """
    kv_heads, head_dim = kv.shape[1] // 2, attended.shape[2]
    group = attended.shape[1] // kv_heads
    count = len(attended) * group
    # By KV head: the queries of its whole group, so that each key is read once. Register tiles may have more rows.
    queries = np.zeros((kv_heads, count + TILE_SIDE, head_dim), np.float32)
    sums = np.zeros((kv_heads, count + TILE_SIDE, head_dim), np.float32)
    row_maxima = np.full((kv_heads, count), -np.inf, np.float32)
    row_sums = np.zeros((kv_heads, count), np.float32)
    for kv_head in range(first, end):
        for q in range(count):
            token, head = q // group, kv_head * group + q % group
            for dimension in range(head_dim):
                queries[kv_head, q, dimension] = query[token, head, dimension] * np.float32(scale)
    scores = np.empty((count + TILE_SIDE, KEY_TILE), np.float32)
    transposed = np.empty((head_dim, STRIP), np.float32)
    strip = np.empty((TILE_SIDE, STRIP), np.float32)
    dimensions = np.arange(head_dim)
    for begin in range(0, visible.size, KEY_TILE):
        key_tile, next_slots = visible[begin : begin + KEY_TILE], visible[begin + KEY_TILE : begin + 2 * KEY_TILE]
        for kv_head in range(first, end):
            keys, values = kv[:, kv_head], kv[:, kv_heads + kv_head]
            prefetch_rows(keys, next_slots)
            prefetch_rows(values, next_slots)
            _score(queries[kv_head], count, keys, key_tile, transposed, dimensions, scores)
            for q in range(count):
                length = lengths[q // group] - begin
                low = max(0, length - window) if window > 0 else 0
                high = min(max(low, length), key_tile.size)
                scores[q, : min(low, key_tile.size)] = 0
                scores[q, high : key_tile.size] = 0
                if low < high:
                    _online_softmax(scores[q, low:high], row_maxima[kv_head], row_sums[kv_head], q, sums[kv_head])
            _add_values(scores, count, values, key_tile, strip, sums[kv_head])
    for kv_head in range(first, end):
        for q in range(count):
            token, head = q // group, kv_head * group + q % group
            for dimension in range(head_dim):
                attended[token, head, dimension] = sums[kv_head, q, dimension] / row_sums[kv_head, q]


@compiled()
def prefetch_rows(rows: Numbers, slots: Indices) -> None:
    """Prefetches these rows into the L2 cache."""
    for index in range(slots.size):
        for dimension in range(0, rows.shape[1], CACHE_LINE // rows.itemsize):
            prefetch_element(rows, slots[index], dimension)


@compiled()
def _score(
    queries: Floats,
    count: int,
    keys: Numbers,
    key_tile: Indices,
    transposed: Floats,
    dimensions: Indices,
    scores: Floats,
) -> None:
    """Scores of `count` queries for each token of the key tile; keys are transposed, which avoids horizontal sums."""
    for begin in range(0, key_tile.size, STRIP):
        filled = min(STRIP, key_tile.size - begin)
        transposed[:, filled:] = 0
        for index in range(filled):
            slot = key_tile[begin + index]
            for dimension in range(len(transposed)):
                transposed[dimension, index] = load_as_float32(keys[slot, dimension])
        for first in range(0, count, TILE_SIDE):
            weighted_sums(
                transposed, dimensions, 0, queries, first, scores[first : first + TILE_SIDE, begin : begin + STRIP]
            )


@compiled()
def _online_softmax(scores: Floats, row_maxima: Floats, row_sums: Floats, q: int, sums: Floats) -> None:
    """One step of the online softmax: scores become weights in place, and earlier sums are rescaled."""
    now = largest(scores, row_maxima[q])
    correction = exponential(row_maxima[q] - now)
    total = row_sums[q] * correction + exponentiate(scores, now)
    for dimension in range(sums.shape[1]):
        sums[q, dimension] *= correction
    row_maxima[q], row_sums[q] = now, total


@compiled()
def _add_values(weights: Floats, count: int, values: Numbers, key_tile: Indices, strip: Floats, sums: Floats) -> None:
    """Adds the key tile's weighted values to `count` sums; overwrites some rows after these."""
    tiled = sums.shape[1] - sums.shape[1] % STRIP
    for at in range(0, tiled, STRIP):
        for first in range(0, count, TILE_SIDE):
            weighted_sums(values, key_tile, at, weights, first, strip)
            for row in range(TILE_SIDE):
                for index in range(STRIP):
                    sums[first + row, at + index] += strip[row, index]
    for q in range(count):
        for index in range(key_tile.size):
            for dimension in range(tiled, sums.shape[1]):
                sums[q, dimension] += weights[q, index] * load_as_float32(values[key_tile[index], dimension])
