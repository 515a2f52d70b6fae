"""The two passes of a softmax over one row of scores: the maximum, then the exponentials and their sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import LN_2, LOG_2_E, SERIES, Floats, exponential
from stitch_server.cpu.simd import INT32, INT64, Intrinsic, broadcast, declare_function, float_vector, unpack_arrays

# Float32 of a vector.
LANES = 16
_FLOATS = float_vector(LANES)


@compiled()
def largest(scores: Floats, previous: Any) -> Any:
    """Returns the maximum of `scores` and of `previous`, the maximum of earlier scores."""
    vector_end = scores.size - scores.size % LANES
    found = max(previous, _largest(scores, vector_end))
    for index in range(vector_end, scores.size):
        found = max(found, scores[index])
    return found


@compiled()
def exponentiate(scores: Floats, limit: Any) -> Any:
    """Replaces each score, none of which is above `limit`, by exp(score - limit); returns their sum."""
    vector_end = scores.size - scores.size % LANES
    total = _exponentiate(scores, vector_end, np.float32(limit))
    for index in range(vector_end, scores.size):
        scores[index] = exponential(scores[index] - limit)
        total += scores[index]
    return total


def _typed_largest(typing: Any, scores: Any, end: Any) -> Intrinsic:
    """The maximum of contiguous scores[:end], in vectors; `end` is a multiple of LANES."""
    return types.float32(scores, types.int64), _generate_largest


def _typed_exponentiate(typing: Any, scores: Any, end: Any, limit: Any) -> Intrinsic:
    """As `exponentiate`, of contiguous scores[:end], in vectors; `end` is a multiple of LANES."""
    return types.float32(scores, types.int64, types.float32), _generate_exponentiate


_largest: Callable[[Floats, int], float] = cast(Any, intrinsic(_typed_largest))
_exponentiate: Callable[[Floats, int, Any], float] = cast(Any, intrinsic(_typed_exponentiate))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, end = unpack_arrays(context, builder, signature, arguments)
    found = alloca_once_value(builder, _FLOATS([float("-inf")] * LANES))  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), end, INT64(LANES)) as (index, _):
        address = builder.bitcast(builder.gep(scores.data, [index]), _FLOATS.as_pointer())
        numbers, so_far = builder.load(address, align=4), builder.load(found)
        builder.store(lanewise_max(builder, numbers, so_far), found)
    kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
    return builder.call(declare_function(builder, kind, f"llvm.vector.reduce.fmax.v{LANES}f32"), [builder.load(found)])


def _generate_exponentiate(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    scores, end, limit = unpack_arrays(context, builder, signature, arguments)
    total = alloca_once_value(builder, _FLOATS([0.0] * LANES))  # type: ignore[no-untyped-call]
    top = broadcast(builder, limit, LANES)
    with for_range_slice(builder, INT64(0), end, INT64(LANES)) as (index, _):
        address = builder.bitcast(builder.gep(scores.data, [index]), _FLOATS.as_pointer())
        powers = exponentials(builder, builder.fsub(builder.load(address, align=4), top))
        builder.store(powers, address, align=4)
        builder.store(builder.fadd(builder.load(total), powers), total)
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
    sums = declare_function(builder, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(sums, [ir.FloatType()(0.0), builder.load(total)], fastmath=("reassoc",))


def exponentials(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """`scalars.exponential` of a vector of numbers that are at most zero; below -87 the result is zero."""

    def of(number: float) -> ir.Value:
        return _FLOATS([number] * LANES)

    def scaled(values: ir.Value, factor: ir.Value, accumulate: ir.Value) -> ir.Value:
        return builder.fadd(builder.fmul(values, factor, flags=("contract",)), accumulate, flags=("contract",))

    floor = declare_function(builder, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.floor.v{LANES}f32")
    power = builder.call(floor, [scaled(values, of(LOG_2_E), of(0.5))])
    rest = scaled(power, of(-LN_2[1]), scaled(power, of(-LN_2[0]), values))
    series = of(SERIES[0])
    for term in SERIES[1:]:
        series = scaled(series, rest, of(term))
    series = scaled(builder.fmul(series, rest), rest, builder.fadd(rest, of(1.0)))
    integers = ir.VectorType(INT32, LANES)
    exponent = builder.add(builder.fptosi(power, integers), integers([127] * LANES))
    powers = builder.fmul(series, builder.bitcast(builder.shl(exponent, integers([23] * LANES)), _FLOATS))
    return builder.select(builder.fcmp_ordered("<", values, of(-87.0)), of(0.0), powers)


def lanewise_max(builder: ir.IRBuilder, numbers: ir.Value, others: ir.Value) -> ir.Value:
    """Returns the maximum lane by lane; a NaN in `numbers` is ignored."""
    return builder.select(builder.fcmp_ordered(">", numbers, others), numbers, others)
