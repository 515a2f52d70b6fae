"""Prefill attention in AMX tiles, in float32 precision by three bfloat16. Knows arrays alone.

As in `prefill.py` the past is read part by part with an online softmax. Scores are computed transposed, as
keys · queriesᵀ, and then valuesᵀ · weights, all operands split into bfloat16 (`bf16x3.py`). So a query stays in one
lane of a vector throughout: the softmax of sixteen queries needs no horizontal sum, and its weights come out as tiles
want them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import SIDE, TILES
from stitch_server.cpu.attention.prefill import PART, prefetch_rows
from stitch_server.cpu.attention.softmax_columns import Bounds, mask, online_softmax, transpose
from stitch_server.cpu.buffers import cache_aligned
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.amx_bf16 import multiply_tiles
from stitch_server.cpu.matmul.bf16x3 import DEPTH, PARTS, Bf16, Bf16Pairs, split_line, split_weights
from stitch_server.cpu.scalars import Floats, Indices, Numbers

# With fewer queries for the same keys tiles take longer than vectors.
FEWEST_QUERIES = 16
# Queries of one task, divided by the threads: keys and values are split once for all of them.
MOST_QUERIES_IN_TILES = 384
# Queries of a strip.
WIDTH = TILES * SIDE


class Strips(NamedTuple):
    """The queries of one KV head, WIDTH in a strip, and the state of their online softmax."""

    # Split: [panels, tiles of inputs, PARTS, SIDE, SIDE]
    queries: Bf16Pairs
    # [queries]: maximum and sum of the softmax so far, and the latest factor for earlier sums.
    row_maxima: Floats
    row_sums: Floats
    corrections: Floats
    # [strips, head_dim, WIDTH]: weighted sums of values.
    sums: Floats


class Part(NamedTuple):
    """Buffers for PART tokens of the past."""

    # Split: [tiles of tokens, tiles of inputs, PARTS, SIDE, DEPTH]
    keys: Bf16
    # Split: [tiles of dimensions, tiles of tokens, PARTS, SIDE, SIDE]
    values: Bf16Pairs
    # [PART, WIDTH]
    scores: Floats
    # Split: [TILES, tiles of tokens, PARTS, SIDE, SIDE]
    weights: Bf16Pairs
    # [WIDTH, WIDTH]
    products: Floats


@compiled()
def attend_in_tiles(
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
    """As `prefill.attend_prefill`, for heads that fill whole tiles."""
    kv_heads, head_dim = kv.shape[1] // 2, attended.shape[2]
    group, all_heads = attended.shape[1] // kv_heads, query.shape[1]
    count = len(attended) * group
    filled = -(-count // WIDTH) * WIDTH
    strips, part = _strips(filled, head_dim), _part(head_dim)
    # By query: its row, and the tokens [low, high) that it sees. The last one is repeated to fill up a strip.
    rows, lows, highs = np.empty(filled, np.int64), np.empty(filled, np.int32), np.empty(filled, np.int32)
    for one in range(filled):
        token = min(one, count - 1) // group
        highs[one] = lengths[token]
        lows[one] = max(0, lengths[token] - window) if window > 0 else 0
    transposed = np.empty((head_dim, SIDE), np.float32)
    queries = query.reshape(len(query) * all_heads, head_dim)
    for kv_head in range(first, end):
        for one in range(filled):
            token, head = divmod(min(one, count - 1), group)
            rows[one] = token * all_heads + kv_head * group + head
        _begin(queries, rows, scale, transposed, strips)
        for begin in range(0, visible.size, PART):
            slots, later = visible[begin : begin + PART], visible[begin + PART : begin + 2 * PART]
            prefetch_rows(kv[:, kv_head], later)
            prefetch_rows(kv[:, kv_heads + kv_head], later)
            _split_keys(kv[:, kv_head], slots, part.keys)
            _split_values(kv[:, kv_heads + kv_head], slots, transposed, part.values)
            for strip in range(filled // WIDTH):
                last = strip * WIDTH + WIDTH - 1
                tokens = min(slots.size, highs[last] - begin)
                if tokens > 0 and lows[strip * WIDTH] < begin + tokens:
                    _attend(strip, begin, tokens, lows, highs, strips, part)
        _end(strips, count, group, kv_head, transposed, attended)


@compiled()
def _strips(count: int, head_dim: int) -> Strips:
    queries = cache_aligned(2 * PARTS * count * head_dim).view(np.uint32)
    return Strips(
        queries.reshape(count // SIDE, head_dim // DEPTH, PARTS, SIDE, SIDE),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        cache_aligned(4 * count * head_dim).view(np.float32).reshape(count // WIDTH, head_dim, WIDTH),
    )


@compiled()
def _part(head_dim: int) -> Part:
    tokens, dimensions = PART // SIDE, head_dim // SIDE
    size = 2 * PARTS * PART * head_dim
    return Part(
        cache_aligned(size).view(np.uint16).reshape(tokens, head_dim // DEPTH, PARTS, SIDE, DEPTH),
        cache_aligned(size).view(np.uint32).reshape(dimensions, PART // DEPTH, PARTS, SIDE, SIDE),
        cache_aligned(4 * PART * WIDTH).view(np.float32).reshape(PART, WIDTH),
        cache_aligned(2 * PARTS * PART * WIDTH).view(np.uint32).reshape(TILES, PART // DEPTH, PARTS, SIDE, SIDE),
        cache_aligned(4 * WIDTH * WIDTH).view(np.float32).reshape(WIDTH, WIDTH),
    )


@compiled()
def _begin(queries: Floats, rows: Indices, scale: float, transposed: Floats, strips: Strips) -> None:
    """Splits the scaled queries of these rows, and resets the softmax."""
    for panel in range(len(strips.queries)):
        for place in range(0, len(transposed), SIDE):
            transpose(queries, rows, panel * SIDE, place, transposed, place)
        for dimension in range(len(transposed)):
            for number in range(SIDE):
                transposed[dimension, number] *= np.float32(scale)
        split_weights(transposed, 0, strips.queries[panel])
    strips.row_maxima[:] = -np.inf
    strips.row_sums[:] = 0
    strips.sums[:] = 0


@compiled()
def _split_keys(keys: Numbers, slots: Indices, parts: Bf16) -> None:
    """Splits keys; the last one is repeated to fill up a tile, and masked later."""
    for place in range(-(-slots.size // DEPTH) * DEPTH):
        slot = slots[min(place, slots.size - 1)]
        for deep in range(parts.shape[1]):
            split_line(keys, slot, deep * DEPTH, parts, place // SIDE, deep, place % SIDE)


@compiled()
def _split_values(values: Numbers, slots: Indices, transposed: Floats, parts: Bf16Pairs) -> None:
    """Splits values, transposed: a row for each dimension."""
    for begin in range(0, slots.size, DEPTH):
        for tile in range(len(parts)):
            transpose(values, slots, begin, tile * SIDE, transposed, 0)
            transpose(values, slots, begin + SIDE, tile * SIDE, transposed, SIDE)
            split_weights(transposed[:DEPTH], 0, parts[tile, begin // DEPTH : begin // DEPTH + 1])


@compiled()
def _attend(strip: int, begin: int, tokens: int, lows: Bounds, highs: Bounds, strips: Strips, part: Part) -> None:
    """Attention of one strip of queries to one part of the past, `tokens` from `begin` on."""
    first, steps = strip * WIDTH, -(-tokens // DEPTH)
    queries = strips.queries[strip * TILES : (strip + 1) * TILES]
    for step in range(steps):
        scores = part.scores[step * DEPTH : (step + 1) * DEPTH]
        multiply_tiles(part.keys, step * TILES, TILES, 0, queries, queries.shape[1], scores, scores, 0, 0, 0)
    # `highs` grow from query to query, so tokens below the first one's need no mask.
    unseen = 0 if lows[first + WIDTH - 1] > begin else max(0, highs[first] - begin)
    for panel in range(TILES):
        one = first + panel * SIDE
        if unseen < steps * DEPTH:
            mask(part.scores, unseen, steps * DEPTH, panel * SIDE, begin, lows, highs, one)
        online_softmax(
            part.scores,
            steps,
            panel * SIDE,
            strips.row_maxima,
            strips.row_sums,
            strips.corrections,
            one,
            part.weights[panel],
        )
    for dimension in range(0, strips.sums.shape[1], WIDTH):
        products = part.products
        multiply_tiles(part.values, dimension // SIDE, TILES, 0, part.weights, steps, products, products, 0, 0, 0)
        for row in range(WIDTH):
            sums = strips.sums[strip, dimension + row]
            for number in range(WIDTH):
                sums[number] = sums[number] * strips.corrections[first + number] + products[row, number]


@compiled()
def _end(strips: Strips, count: int, group: int, kv_head: int, transposed: Floats, attended: Floats) -> None:
    """Divides by the softmax's sums, and writes to `attended`."""
    dimensions = np.arange(len(transposed))
    for first in range(0, count, SIDE):
        sums, column = strips.sums[first // WIDTH], first % WIDTH
        for place in range(0, len(transposed), SIDE):
            transpose(sums, dimensions, place, column, transposed, 0)
            for one in range(first, min(first + SIDE, count)):
                token, head = divmod(one, group)
                for number in range(SIDE):
                    mean = transposed[one - first, number] / strips.row_sums[one]
                    attended[token, kv_head * group + head, place + number] = mean
