"""Prefill attention in AMX tiles, in float32 precision by three bfloat16.

As in `prefill.py` the context is read one key tile at a time with an online softmax. Scores are computed transposed, as
keys · queriesᵀ, and then valuesᵀ · weights, all operands split into bfloat16 (`bf16x3.py`). So a query stays in one
lane of a vector throughout: the softmax of sixteen queries needs no horizontal sum, and its weights come out in the
layout of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.attention.prefill import KEY_TILE, prefetch_rows
from stitch_server.cpu.attention.softmax import exponentials, lanewise_max
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.bf16x3 import (
    BF16_TILE_INPUTS,
    TERMS,
    Bf16,
    Bf16Pairs,
    line_of,
    matmul_tiles,
    put_pair,
    split_line,
    split_weights,
)
from stitch_server.cpu.scalars import Floats, Indices, Numbers
from stitch_server.cpu.simd import (
    BLOCK_TILES,
    INT32,
    INT64,
    TILE_SIDE,
    Intrinsic,
    cache_aligned,
    float_vector,
    load_as_float32,
    row_of,
    unpack_arrays,
)

# By query: the first token that it attends to, or the end of these.
Bounds = NDArray[np.int32]

_FLOATS, _WHOLE = float_vector(TILE_SIDE), ir.VectorType(INT32, TILE_SIDE)
_NOTHING = _FLOATS([float("-inf")] * TILE_SIDE)


def _typed_transpose(typing: Any, source: Any, rows: Any, begin: Any, index: Any, target: Any, line: Any) -> Intrinsic:
    """target[line + d, n] = source[rows[begin + n], index + d] for d and n below TILE_SIDE.

    After the end of `rows` its last one is repeated. Both arrays have contiguous rows; the source's are float32 or the
    bits of bfloat16.
    """
    int64 = types.int64
    return types.void(source, rows, int64, int64, target, int64), _generate_transpose


def _typed_mask(
    typing: Any, scores: Any, first: Any, end: Any, column: Any, begin: Any, lows: Any, highs: Any, q: Any
) -> Intrinsic:
    """Sets scores[first:end, column : column + TILE_SIDE] to minus infinity where a query doesn't attend to the token.

    Column c belongs to query `q` + c - `column`, row n to the token `begin` + n; a query attends to [low, high).
    """
    int64 = types.int64
    return types.void(scores, int64, int64, int64, int64, lows, highs, int64), _generate_mask


def _typed_online_softmax(
    typing: Any,
    scores: Any,
    steps: Any,
    column: Any,
    row_maxima: Any,
    row_sums: Any,
    corrections: Any,
    q: Any,
    terms: Any,
) -> Intrinsic:
    """One step of the softmax over scores[: steps * BF16_TILE_INPUTS, column : column + TILE_SIDE].

    The columns are the queries from `q` on. Writes the weights, split into bfloat16, to `terms`. Updates `row_maxima`
    and `row_sums`, and sets `corrections` to the factors by which earlier sums are to be multiplied.
    """
    int64 = types.int64
    return types.void(scores, int64, int64, row_maxima, row_sums, corrections, int64, terms), _generate_online_softmax


transpose: Callable[[Numbers, Indices, int, int, Floats, int], None] = cast(Any, intrinsic(_typed_transpose))
mask: Callable[[Floats, int, int, int, int, Bounds, Bounds, int], None] = cast(Any, intrinsic(_typed_mask))
online_softmax: Callable[[Floats, int, int, Floats, Floats, Floats, int, Bf16Pairs], None] = cast(
    Any, intrinsic(_typed_online_softmax)
)


def _generate_transpose(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    source, rows, begin, index, target, line = unpack_arrays(context, builder, signature, arguments)
    last = builder.sub(builder.extract_value(rows.shape, 0), INT64(1))
    numbers = []
    for number in range(TILE_SIDE):
        at = builder.add(begin, INT64(number))
        at = builder.select(builder.icmp_signed("<", at, last), at, last)
        row = row_of(builder, source, builder.load(builder.gep(rows.data, [at])))
        numbers.append(load_as_float32(builder, builder.gep(row, [index]), TILE_SIDE))
    # A transposition by swaps of off-diagonal blocks, from halves down to single numbers.
    stride = TILE_SIDE
    while stride := stride // 2:
        for upper in (number for number in range(TILE_SIDE) if not number & stride):
            pair = numbers[upper], numbers[upper + stride]
            upper_lanes = [lane if not lane & stride else TILE_SIDE + lane - stride for lane in range(TILE_SIDE)]
            lower_lanes = [lane + stride if not lane & stride else TILE_SIDE + lane for lane in range(TILE_SIDE)]
            numbers[upper], numbers[upper + stride] = (
                builder.shuffle_vector(*pair, _WHOLE(lanes)) for lanes in (upper_lanes, lower_lanes)
            )
    for number, vector in enumerate(numbers):
        address = row_of(builder, target, builder.add(line, INT64(number)))
        builder.store(vector, builder.bitcast(address, _FLOATS.as_pointer()), align=4)
    return context.get_dummy_value()


def _generate_mask(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, first, end, column, begin, lows, highs, q = unpack_arrays(context, builder, signature, arguments)
    low, high = (_lanes(builder, bounds.data, q, _WHOLE) for bounds in (lows, highs))
    low, high = builder.load(low, align=4), builder.load(high, align=4)
    nothing = _WHOLE(ir.Undefined)
    with for_range_slice(builder, first, end, INT64(1)) as (row, _):
        token = builder.trunc(builder.add(begin, row), INT32)
        token = builder.shuffle_vector(
            builder.insert_element(nothing, token, INT32(0)), nothing, _WHOLE([0] * TILE_SIDE)
        )
        visible = builder.and_(builder.icmp_signed("<=", low, token), builder.icmp_signed("<", token, high))
        address = _lanes(builder, row_of(builder, scores, row), column, _FLOATS)
        builder.store(builder.select(visible, builder.load(address, align=4), _NOTHING), address, align=4)
    return context.get_dummy_value()


def _generate_online_softmax(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    scores, steps, column, row_maxima, row_sums, corrections, q, terms = unpack_arrays(
        context, builder, signature, arguments
    )
    top, total, correction = (_lanes(builder, array.data, q, _FLOATS) for array in (row_maxima, row_sums, corrections))

    def of(row: ir.Value) -> ir.Value:
        return builder.load(_lanes(builder, row_of(builder, scores, row), column, _FLOATS), align=4)

    before = builder.load(top, align=4)
    found = alloca_once_value(builder, before)  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), builder.mul(steps, INT64(BF16_TILE_INPUTS)), INT64(1)) as (row, _):
        builder.store(lanewise_max(builder, of(row), builder.load(found)), found)
    now = builder.load(found)
    builder.store(now, top, align=4)
    # A query that has attended to no token yet has weights of zero, not NaN.
    limit = builder.select(builder.fcmp_ordered("==", now, _NOTHING), _FLOATS([0.0] * TILE_SIDE), now)
    factor = exponentials(builder, builder.fsub(before, limit))
    builder.store(factor, correction, align=4)
    sums = alloca_once_value(builder, builder.fmul(builder.load(total, align=4), factor))  # type: ignore[no-untyped-call]
    with (
        for_range_slice(builder, INT64(0), steps, INT64(1)) as (step, _),
        for_range_slice(builder, INT64(0), INT64(TILE_SIDE), INT64(1)) as (pair, _),
    ):
        row = builder.add(builder.mul(step, INT64(BF16_TILE_INPUTS)), pair)
        lower, upper = (
            exponentials(builder, builder.fsub(of(builder.add(row, INT64(stride))), limit)) for stride in (0, TILE_SIDE)
        )
        builder.store(builder.fadd(builder.load(sums), builder.fadd(lower, upper)), sums)
        put_pair(builder, lower, upper, line_of(builder, terms, step, pair))
    builder.store(builder.load(sums), total, align=4)
    return context.get_dummy_value()


def _lanes(builder: ir.IRBuilder, data: ir.Value, index: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


# With fewer queries for the same keys tiles take longer than vectors.
MIN_AMX_QUERIES = 16
# Queries of one task, divided by the threads: keys and values are split once for all of them.
MAX_AMX_QUERIES = 384
# Queries of a strip.
STRIP_QUERIES = BLOCK_TILES * TILE_SIDE


class Strips(NamedTuple):
    """The queries of one KV head, STRIP_QUERIES in a strip, and the state of their online softmax."""

    # Split: [panels, tiles of inputs, TERMS, TILE_SIDE, TILE_SIDE]
    queries: Bf16Pairs
    # [queries]: maximum and sum of the softmax so far, and the latest factor for earlier sums.
    row_maxima: Floats
    row_sums: Floats
    corrections: Floats
    # [strips, head_dim, STRIP_QUERIES]: weighted sums of values.
    sums: Floats


class KeyTile(NamedTuple):
    """Buffers for KEY_TILE tokens of the context."""

    # Split: [tiles of tokens, tiles of inputs, TERMS, TILE_SIDE, BF16_TILE_INPUTS]
    keys: Bf16
    # Split: [tiles of dimensions, tiles of tokens, TERMS, TILE_SIDE, TILE_SIDE]
    values: Bf16Pairs
    # [KEY_TILE, STRIP_QUERIES]
    scores: Floats
    # Split: [BLOCK_TILES, tiles of tokens, TERMS, TILE_SIDE, TILE_SIDE]
    weights: Bf16Pairs
    # [STRIP_QUERIES, STRIP_QUERIES]
    products: Floats


@compiled()
def attend_prefill_amx(
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
    filled = -(-count // STRIP_QUERIES) * STRIP_QUERIES
    strips, key_tile = _new_strips(filled, head_dim), _new_key_tile(head_dim)
    # By query: its row, and the tokens [low, high) that it attends to. The last one is repeated to fill up a strip.
    rows, lows, highs = np.empty(filled, np.int64), np.empty(filled, np.int32), np.empty(filled, np.int32)
    for q in range(filled):
        token = min(q, count - 1) // group
        highs[q] = lengths[token]
        lows[q] = max(0, lengths[token] - window) if window > 0 else 0
    transposed = np.empty((head_dim, TILE_SIDE), np.float32)
    queries = query.reshape(len(query) * all_heads, head_dim)
    for kv_head in range(first, end):
        for q in range(filled):
            token, head = divmod(min(q, count - 1), group)
            rows[q] = token * all_heads + kv_head * group + head
        _start(queries, rows, scale, transposed, strips)
        for begin in range(0, visible.size, KEY_TILE):
            slots, next_slots = visible[begin : begin + KEY_TILE], visible[begin + KEY_TILE : begin + 2 * KEY_TILE]
            prefetch_rows(kv[:, kv_head], next_slots)
            prefetch_rows(kv[:, kv_heads + kv_head], next_slots)
            _split_keys(kv[:, kv_head], slots, key_tile.keys)
            _split_values(kv[:, kv_heads + kv_head], slots, transposed, key_tile.values)
            for strip in range(filled // STRIP_QUERIES):
                last = strip * STRIP_QUERIES + STRIP_QUERIES - 1
                tokens = min(slots.size, highs[last] - begin)
                if tokens > 0 and lows[strip * STRIP_QUERIES] < begin + tokens:
                    _attend_strip(strip, begin, tokens, lows, highs, strips, key_tile)
        _finish(strips, count, group, kv_head, transposed, attended)


@compiled()
def _new_strips(count: int, head_dim: int) -> Strips:
    queries = cache_aligned(2 * TERMS * count * head_dim).view(np.uint32)
    return Strips(
        queries.reshape(count // TILE_SIDE, head_dim // BF16_TILE_INPUTS, TERMS, TILE_SIDE, TILE_SIDE),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        cache_aligned(4 * count * head_dim).view(np.float32).reshape(count // STRIP_QUERIES, head_dim, STRIP_QUERIES),
    )


@compiled()
def _new_key_tile(head_dim: int) -> KeyTile:
    tokens, dimensions = KEY_TILE // TILE_SIDE, head_dim // TILE_SIDE
    size = 2 * TERMS * KEY_TILE * head_dim
    return KeyTile(
        cache_aligned(size)
        .view(np.uint16)
        .reshape(tokens, head_dim // BF16_TILE_INPUTS, TERMS, TILE_SIDE, BF16_TILE_INPUTS),
        cache_aligned(size)
        .view(np.uint32)
        .reshape(dimensions, KEY_TILE // BF16_TILE_INPUTS, TERMS, TILE_SIDE, TILE_SIDE),
        cache_aligned(4 * KEY_TILE * STRIP_QUERIES).view(np.float32).reshape(KEY_TILE, STRIP_QUERIES),
        cache_aligned(2 * TERMS * KEY_TILE * STRIP_QUERIES)
        .view(np.uint32)
        .reshape(BLOCK_TILES, KEY_TILE // BF16_TILE_INPUTS, TERMS, TILE_SIDE, TILE_SIDE),
        cache_aligned(4 * STRIP_QUERIES * STRIP_QUERIES).view(np.float32).reshape(STRIP_QUERIES, STRIP_QUERIES),
    )


@compiled()
def _start(queries: Floats, rows: Indices, scale: float, transposed: Floats, strips: Strips) -> None:
    """Splits the scaled queries of these rows, and resets the softmax."""
    for panel in range(len(strips.queries)):
        for index in range(0, len(transposed), TILE_SIDE):
            transpose(queries, rows, panel * TILE_SIDE, index, transposed, index)
        for dimension in range(len(transposed)):
            for number in range(TILE_SIDE):
                transposed[dimension, number] *= np.float32(scale)
        split_weights(transposed, 0, strips.queries[panel])
    strips.row_maxima[:] = -np.inf
    strips.row_sums[:] = 0
    strips.sums[:] = 0


@compiled()
def _split_keys(keys: Numbers, slots: Indices, terms: Bf16) -> None:
    """Splits keys; the last one is repeated to fill up a tile, and masked later."""
    for index in range(-(-slots.size // BF16_TILE_INPUTS) * BF16_TILE_INPUTS):
        slot = slots[min(index, slots.size - 1)]
        for k_tile in range(terms.shape[1]):
            split_line(keys, slot, k_tile * BF16_TILE_INPUTS, terms, index // TILE_SIDE, k_tile, index % TILE_SIDE)


@compiled()
def _split_values(values: Numbers, slots: Indices, transposed: Floats, terms: Bf16Pairs) -> None:
    """Splits values, transposed: a row for each dimension."""
    for begin in range(0, slots.size, BF16_TILE_INPUTS):
        for tile in range(len(terms)):
            transpose(values, slots, begin, tile * TILE_SIDE, transposed, 0)
            transpose(values, slots, begin + TILE_SIDE, tile * TILE_SIDE, transposed, TILE_SIDE)
            split_weights(
                transposed[:BF16_TILE_INPUTS], 0, terms[tile, begin // BF16_TILE_INPUTS : begin // BF16_TILE_INPUTS + 1]
            )


@compiled()
def _attend_strip(
    strip: int, begin: int, tokens: int, lows: Bounds, highs: Bounds, strips: Strips, key_tile: KeyTile
) -> None:
    """Attention of one strip of queries to one key tile, `tokens` tokens from `begin` on."""
    first, steps = strip * STRIP_QUERIES, -(-tokens // BF16_TILE_INPUTS)
    queries = strips.queries[strip * BLOCK_TILES : (strip + 1) * BLOCK_TILES]
    for step in range(steps):
        scores = key_tile.scores[step * BF16_TILE_INPUTS : (step + 1) * BF16_TILE_INPUTS]
        matmul_tiles(
            key_tile.keys, step * BLOCK_TILES, BLOCK_TILES, 0, queries, queries.shape[1], scores, scores, 0, 0, 0
        )
    # `highs` grow from query to query, so tokens below the first query's need no mask.
    unmasked = 0 if lows[first + STRIP_QUERIES - 1] > begin else max(0, highs[first] - begin)
    for panel in range(BLOCK_TILES):
        q = first + panel * TILE_SIDE
        if unmasked < steps * BF16_TILE_INPUTS:
            mask(key_tile.scores, unmasked, steps * BF16_TILE_INPUTS, panel * TILE_SIDE, begin, lows, highs, q)
        online_softmax(
            key_tile.scores,
            steps,
            panel * TILE_SIDE,
            strips.row_maxima,
            strips.row_sums,
            strips.corrections,
            q,
            key_tile.weights[panel],
        )
    for dimension in range(0, strips.sums.shape[1], STRIP_QUERIES):
        products = key_tile.products
        matmul_tiles(
            key_tile.values,
            dimension // TILE_SIDE,
            BLOCK_TILES,
            0,
            key_tile.weights,
            steps,
            products,
            products,
            0,
            0,
            0,
        )
        for row in range(STRIP_QUERIES):
            sums = strips.sums[strip, dimension + row]
            for number in range(STRIP_QUERIES):
                sums[number] = sums[number] * strips.corrections[first + number] + products[row, number]


@compiled()
def _finish(strips: Strips, count: int, group: int, kv_head: int, transposed: Floats, attended: Floats) -> None:
    """Divides by the softmax's sums, and writes to `attended`."""
    dimensions = np.arange(len(transposed))
    for first in range(0, count, TILE_SIDE):
        sums, column = strips.sums[first // STRIP_QUERIES], first % STRIP_QUERIES
        for index in range(0, len(transposed), TILE_SIDE):
            transpose(sums, dimensions, index, column, transposed, 0)
            for q in range(first, min(first + TILE_SIDE, count)):
                token, head = divmod(q, group)
                for number in range(TILE_SIDE):
                    mean = transposed[q - first, number] / strips.row_sums[q]
                    attended[token, kv_head * group + head, index + number] = mean
