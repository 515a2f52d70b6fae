"""Rows in digits, which are bytes, in the form that tiles take. Knows arrays alone.

A number of a row becomes a whole one of 24 bits, times what the row's largest one asks for, and has three digits to the
base of 256, from -128 to 127. By bytes these give sums without any rounding, so it doesn't matter which come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.loops.amx import SIDE
from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats
from stitch_server.loops.vectors import INT8, INT32, INT64, Generated, floats, function, opened, row_of, spread, widened

Digits = NDArray[np.int8]
# Weights of four neighbouring inputs, the first one's lowest.
Quads = NDArray[np.int32]
Wholes = NDArray[np.int32]

# Of a number.
DIGITS = 3
# Inputs of a tile: four for each of its outputs.
DEPTH = 4 * SIDE
# With more a sum might not have room in 32 bits.
MOST_INPUTS = 2**31 // 2**14
# A row's largest number; its digits leave room for what multiplying it rounds.
_MOST = np.float32(127 * 2**16)
# What is less counts as nothing.
_LEAST = np.float32(1e-30)

_WHOLES, _BYTES = ir.VectorType(INT32, SIDE), ir.VectorType(INT8, SIDE)


@compiled()
def split_in_digits(x: Floats, digits: Digits, scales: Floats) -> None:
    """`[rows, inputs]` to lines of `[tiles of lines, tiles of inputs, SIDE, DEPTH]`: a row's DIGITS, lowest first.

    A row is its whole numbers times its scale, which is no number where one of the row's isn't finite.
    """
    inputs = x.shape[1]
    whole = inputs // DEPTH
    padded = np.zeros((1, DEPTH), np.float32)
    for row in range(len(x)):
        padded[0, : inputs - whole * DEPTH] = x[row, whole * DEPTH :]
        # Without their signs numbers are as large as their bits, and those that stand for none are the largest.
        bits = max(_largest(x, row, whole * DEPTH), _largest(padded, 0, DEPTH))
        size = np.int32(bits).view(np.float32)
        factor = _MOST / size if _LEAST < size < np.inf else np.float32(0)
        scales[row] = size / _MOST if size < np.inf else np.float32(np.nan)
        for deep in range(whole):
            _split(x, row, deep * DEPTH, factor, digits, deep, DIGITS * row)
        if whole < digits.shape[1]:
            _split(padded, 0, 0, factor, digits, whole, DIGITS * row)


def _typed_largest(typing: Any, x: Any, row: Any, end: Any) -> Generated:
    """The bits of the largest of x[row, :end], signs left aside; the end is a multiple of SIDE."""
    return types.int32(x, types.int64, types.int64), _generate_largest


def _typed_split(
    typing: Any, x: Any, row: Any, place: Any, factor: Any, digits: Any, deep: Any, line: Any
) -> Generated:
    """Digits of factor · x[row, place : place + DEPTH] to lines from `line` on, of all; `digits` lies in one piece."""
    whole = types.int64
    return types.void(x, whole, whole, types.float32, digits, whole, whole), _generate_split


_largest: Callable[[Floats, int, int], int] = cast(Any, intrinsic(_typed_largest))
_split: Callable[[Floats, int, int, np.float32, Digits, int, int], None] = cast(Any, intrinsic(_typed_split))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    x, row, end = opened(context, builder, signature, arguments)
    source = row_of(builder, x, row)
    found = alloca_once_value(builder, _WHOLES([0] * SIDE))  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), end, INT64(SIDE)) as (place, _):
        address = builder.bitcast(builder.gep(source, [place]), _WHOLES.as_pointer())
        bits = builder.and_(builder.load(address, align=4), _WHOLES([0x7FFFFFFF] * SIDE))
        largest = builder.load(found)
        builder.store(builder.select(builder.icmp_signed(">", bits, largest), bits, largest), found)
    kind = ir.FunctionType(INT32, [_WHOLES])
    return builder.call(function(builder, kind, f"llvm.vector.reduce.smax.v{SIDE}i32"), [builder.load(found)])


def _generate_split(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    x, row, place, factor, digits, deep, line = opened(context, builder, signature, arguments)
    source = builder.gep(row_of(builder, x, row), [place])
    factors = spread(builder, factor, SIDE)
    targets = []
    for digit in range(DIGITS):
        number = builder.add(line, INT64(digit))
        tile, within = builder.udiv(number, INT64(SIDE)), builder.urem(number, INT64(SIDE))
        at = builder.add(builder.mul(tile, builder.extract_value(digits.shape, 1)), deep)
        at = builder.add(builder.mul(at, INT64(SIDE)), within)
        targets.append(builder.gep(digits.data, [builder.mul(at, INT64(DEPTH))]))
    nearest = function(builder, ir.FunctionType(floats(SIDE), [floats(SIDE)]), f"llvm.rint.v{SIDE}f32")
    for begin in range(0, DEPTH, SIDE):
        values = builder.fmul(widened(builder, builder.gep(source, [INT64(begin)]), SIDE), factors)
        left = builder.fptosi(builder.call(nearest, [values]), _WHOLES)
        for target in targets:
            here = builder.bitcast(builder.gep(target, [INT64(begin)]), _BYTES.as_pointer())
            builder.store(builder.trunc(left, _BYTES), here, align=1)
            # What is left is a whole number again, since the digit may be negative.
            left = builder.ashr(builder.add(left, _WHOLES([128] * SIDE)), _WHOLES([8] * SIDE))
    return context.get_dummy_value()
