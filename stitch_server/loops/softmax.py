"""The halves of a softmax: the largest score, and what all become below it. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import LN_2, LOG_2_E, SERIES, Floats, exponential
from stitch_server.loops.vectors import INT32, INT64, Generated, floats, function, opened, spread

# Numbers in a vector.
LANES = 16
_FLOATS = floats(LANES)


@compiled()
def largest(scores: Floats, before: Any) -> Any:
    """Of `[scores]` and one that was `before` them."""
    whole = scores.size - scores.size % LANES
    found = max(before, _largest(scores, whole))
    for place in range(whole, scores.size):
        found = max(found, scores[place])
    return found


@compiled()
def shares(scores: Floats, most: Any) -> Any:
    """Makes e to the power of what each is above `most` of it; their sum. None is above it."""
    whole = scores.size - scores.size % LANES
    total = _shares(scores, whole, np.float32(most))
    for place in range(whole, scores.size):
        scores[place] = exponential(scores[place] - most)
        total += scores[place]
    return total


def _typed_largest(typing: Any, scores: Any, end: Any) -> Generated:
    """The largest of scores[:end], which lie in one piece, by vectors; the end is a multiple of LANES."""
    return types.float32(scores, types.int64), _generate_largest


def _typed_shares(typing: Any, scores: Any, end: Any, most: Any) -> Generated:
    """As `shares`, of scores[:end], which lie in one piece, by vectors; the end is a multiple of LANES."""
    return types.float32(scores, types.int64, types.float32), _generate_shares


_largest: Callable[[Floats, int], float] = cast(Any, intrinsic(_typed_largest))
_shares: Callable[[Floats, int, Any], float] = cast(Any, intrinsic(_typed_shares))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, end = opened(context, builder, signature, arguments)
    found = alloca_once_value(builder, _FLOATS([float("-inf")] * LANES))  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), end, INT64(LANES)) as (place, _):
        address = builder.bitcast(builder.gep(scores.data, [place]), _FLOATS.as_pointer())
        numbers, so_far = builder.load(address, align=4), builder.load(found)
        builder.store(larger(builder, numbers, so_far), found)
    kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
    return builder.call(function(builder, kind, f"llvm.vector.reduce.fmax.v{LANES}f32"), [builder.load(found)])


def _generate_shares(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, end, most = opened(context, builder, signature, arguments)
    total = alloca_once_value(builder, _FLOATS([0.0] * LANES))  # type: ignore[no-untyped-call]
    top = spread(builder, most, LANES)
    with for_range_slice(builder, INT64(0), end, INT64(LANES)) as (place, _):
        address = builder.bitcast(builder.gep(scores.data, [place]), _FLOATS.as_pointer())
        powers = exponentials(builder, builder.fsub(builder.load(address, align=4), top))
        builder.store(powers, address, align=4)
        builder.store(builder.fadd(builder.load(total), powers), total)
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
    sums = function(builder, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(sums, [ir.FloatType()(0.0), builder.load(total)], fastmath=("reassoc",))


def exponentials(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """`numbers.exponential` of a vector without any that is above zero; below -87 nothing at all."""

    def of(number: float) -> ir.Value:
        return _FLOATS([number] * LANES)

    def scaled(values: ir.Value, factor: ir.Value, added: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(values, factor, flags=("contract",)), added, flags=("contract",))

    floor = function(builder, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.floor.v{LANES}f32")
    power = builder.call(floor, [scaled(values, of(LOG_2_E), of(0.5))])
    rest = scaled(power, of(-LN_2[1]), scaled(power, of(-LN_2[0]), values))
    series = of(SERIES[0])
    for term in SERIES[1:]:
        series = scaled(series, rest, of(term))
    series = scaled(builder.fmul(series, rest), rest, builder.fadd(rest, of(1.0)))
    whole = ir.VectorType(INT32, LANES)
    exponent = builder.add(builder.fptosi(power, whole), whole([127] * LANES))
    powers = builder.fmul(series, builder.bitcast(builder.shl(exponent, whole([23] * LANES)), _FLOATS))
    return builder.select(builder.fcmp_ordered("<", values, of(-87.0)), of(0.0), powers)


def larger(builder: ir.IRBuilder, numbers: ir.Value, others: ir.Value) -> ir.Value:
    """Lane by lane, but never a number that is none of the first ones."""
    return builder.select(builder.fcmp_ordered(">", numbers, others), numbers, others)
