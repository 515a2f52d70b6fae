"""An online softmax down columns of scores: each lane of a vector has a query of its own. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.amx import SIDE
from stitch_server.cpu.attention.softmax import elementwise_max, exponentials
from stitch_server.cpu.matmul.bf16x3 import DEPTH, Bf16Pairs, line_of, put_pair
from stitch_server.cpu.scalars import Floats, Indices, Numbers
from stitch_server.cpu.vectors import INT32, INT64, Intrinsic, floats, row_of, unpacked, widened

# By query: the first token that it sees, or one behind the last.
Bounds = NDArray[np.int32]

_FLOATS, _WHOLE = floats(SIDE), ir.VectorType(INT32, SIDE)
_NOTHING = _FLOATS([float("-inf")] * SIDE)


def _typed_transpose(typing: Any, source: Any, rows: Any, begin: Any, place: Any, target: Any, line: Any) -> Intrinsic:
    """target[line + d, n] = source[rows[begin + n], place + d] for d and n below SIDE.

    Behind the end of `rows` its last one is repeated. Both arrays have contiguous rows; the source's are float32 or the
    bits of bfloat16.
    """
    whole = types.int64
    return types.void(source, rows, whole, whole, target, whole), _generate_transpose


def _typed_mask(
    typing: Any, scores: Any, first: Any, end: Any, column: Any, begin: Any, lows: Any, highs: Any, one: Any
) -> Intrinsic:
    """Sets scores[first:end, column : column + SIDE] to minus infinity where a query doesn't see the token.

    Column c belongs to query `one` + c - `column`, row n to the token `begin` + n; a query sees tokens [low, high).
    """
    whole = types.int64
    return types.void(scores, whole, whole, whole, whole, lows, highs, whole), _generate_mask


def _typed_online_softmax(
    typing: Any,
    scores: Any,
    steps: Any,
    column: Any,
    row_maxima: Any,
    row_sums: Any,
    corrections: Any,
    one: Any,
    parts: Any,
) -> Intrinsic:
    """One step of the softmax over scores[: steps * DEPTH, column : column + SIDE] of queries from `one` on.

    Writes the weights, split into bfloat16, to `parts`. Updates `row_maxima` and `row_sums`, and sets `corrections` to
    what earlier sums are to be multiplied by.
    """
    whole = types.int64
    return types.void(scores, whole, whole, row_maxima, row_sums, corrections, whole, parts), _generate_online_softmax


transpose: Callable[[Numbers, Indices, int, int, Floats, int], None] = cast(Any, intrinsic(_typed_transpose))
mask: Callable[[Floats, int, int, int, int, Bounds, Bounds, int], None] = cast(Any, intrinsic(_typed_mask))
online_softmax: Callable[[Floats, int, int, Floats, Floats, Floats, int, Bf16Pairs], None] = cast(
    Any, intrinsic(_typed_online_softmax)
)


def _generate_transpose(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    source, rows, begin, place, target, line = unpacked(context, builder, signature, arguments)
    last = builder.sub(builder.extract_value(rows.shape, 0), INT64(1))
    numbers = []
    for number in range(SIDE):
        at = builder.add(begin, INT64(number))
        at = builder.select(builder.icmp_signed("<", at, last), at, last)
        row = row_of(builder, source, builder.load(builder.gep(rows.data, [at])))
        numbers.append(widened(builder, builder.gep(row, [place]), SIDE))
    # A transposition by swaps of off-diagonal blocks, from halves down to single numbers.
    apart = SIDE
    while apart := apart // 2:
        for upper in (number for number in range(SIDE) if not number & apart):
            pair = numbers[upper], numbers[upper + apart]
            kept = [lane if not lane & apart else SIDE + lane - apart for lane in range(SIDE)]
            moved = [lane + apart if not lane & apart else SIDE + lane for lane in range(SIDE)]
            numbers[upper], numbers[upper + apart] = (
                builder.shuffle_vector(*pair, _WHOLE(lanes)) for lanes in (kept, moved)
            )
    for number, vector in enumerate(numbers):
        address = row_of(builder, target, builder.add(line, INT64(number)))
        builder.store(vector, builder.bitcast(address, _FLOATS.as_pointer()), align=4)
    return context.get_dummy_value()


def _generate_mask(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, first, end, column, begin, lows, highs, one = unpacked(context, builder, signature, arguments)
    low, high = (_lanes(builder, bounds.data, one, _WHOLE) for bounds in (lows, highs))
    low, high = builder.load(low, align=4), builder.load(high, align=4)
    nothing = _WHOLE(ir.Undefined)
    with for_range_slice(builder, first, end, INT64(1)) as (row, _):
        token = builder.trunc(builder.add(begin, row), INT32)
        token = builder.shuffle_vector(builder.insert_element(nothing, token, INT32(0)), nothing, _WHOLE([0] * SIDE))
        visible = builder.and_(builder.icmp_signed("<=", low, token), builder.icmp_signed("<", token, high))
        address = _lanes(builder, row_of(builder, scores, row), column, _FLOATS)
        builder.store(builder.select(visible, builder.load(address, align=4), _NOTHING), address, align=4)
    return context.get_dummy_value()


def _generate_online_softmax(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    scores, steps, column, row_maxima, row_sums, corrections, one, parts = unpacked(
        context, builder, signature, arguments
    )
    top, total, correction = (
        _lanes(builder, array.data, one, _FLOATS) for array in (row_maxima, row_sums, corrections)
    )

    def of(row: ir.Value) -> ir.Value:
        return builder.load(_lanes(builder, row_of(builder, scores, row), column, _FLOATS), align=4)

    before = builder.load(top, align=4)
    found = alloca_once_value(builder, before)  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), builder.mul(steps, INT64(DEPTH)), INT64(1)) as (row, _):
        builder.store(elementwise_max(builder, of(row), builder.load(found)), found)
    now = builder.load(found)
    builder.store(now, top, align=4)
    # A query that has seen nothing yet has weights of zero, not NaN.
    most = builder.select(builder.fcmp_ordered("==", now, _NOTHING), _FLOATS([0.0] * SIDE), now)
    factor = exponentials(builder, builder.fsub(before, most))
    builder.store(factor, correction, align=4)
    sums = alloca_once_value(builder, builder.fmul(builder.load(total, align=4), factor))  # type: ignore[no-untyped-call]
    with (
        for_range_slice(builder, INT64(0), steps, INT64(1)) as (step, _),
        for_range_slice(builder, INT64(0), INT64(SIDE), INT64(1)) as (pair, _),
    ):
        row = builder.add(builder.mul(step, INT64(DEPTH)), pair)
        lower, upper = (
            exponentials(builder, builder.fsub(of(builder.add(row, INT64(apart))), most)) for apart in (0, SIDE)
        )
        builder.store(builder.fadd(builder.load(sums), builder.fadd(lower, upper)), sums)
        put_pair(builder, lower, upper, line_of(builder, parts, step, pair))
    builder.store(builder.load(sums), total, align=4)
    return context.get_dummy_value()


def _lanes(builder: ir.IRBuilder, data: ir.Value, place: ir.Value, kind: ir.VectorType) -> ir.Value:
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())
