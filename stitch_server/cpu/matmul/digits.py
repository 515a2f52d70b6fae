"""Splits rows of float32 into int8 digits, in the layout of AMX tiles. Knows arrays alone.

Scaled by its row's largest number, each becomes an integer of 24 bits: three digits to the base 256, from -128 to 127.
Their products by int8 weights sum up exactly in int32, in any order.
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

from stitch_server.cpu.amx import SIDE
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Floats
from stitch_server.cpu.vectors import (
    INT8,
    INT32,
    INT64,
    Intrinsic,
    broadcast,
    floats,
    function,
    row_of,
    unpacked,
    widened,
)

Digits = NDArray[np.int8]
# int8 weights of four neighbouring inputs in one word, the first one lowest.
Int8Quads = NDArray[np.int32]
Int32s = NDArray[np.int32]

# Digits of a number.
DIGITS = 3
# Inputs of a tile: four for each of its rows.
DEPTH = 4 * SIDE
# With more inputs a sum might overflow int32.
MOST_INPUTS = 2**31 // 2**14
# What a row's largest number becomes; it leaves room for rounding.
_MOST = np.float32(127 * 2**16)
# Rows whose largest number is smaller count as zero.
_LEAST = np.float32(1e-30)

_WHOLES, _BYTES = ir.VectorType(INT32, SIDE), ir.VectorType(INT8, SIDE)


@compiled()
def split_into_digits(x: Floats, digits: Digits, scales: Floats) -> None:
    """`[rows, inputs]` to lines of `[tiles of lines, tiles of inputs, SIDE, DEPTH]`: a row's DIGITS, lowest first.

    A row is its integers times its scale, which is NaN where the row has a number that isn't finite.
    """
    inputs = x.shape[1]
    whole = inputs // DEPTH
    padded = np.zeros((1, DEPTH), np.float32)
    for row in range(len(x)):
        for place in range(whole * DEPTH, inputs):
            padded[0, place - whole * DEPTH] = x[row, place]
        # Without their signs, floats are ordered as their bits are; infinities and NaN come last.
        bits = max(_largest(x, row, whole * DEPTH), _largest(padded, 0, DEPTH))
        size = np.int32(bits).view(np.float32)
        factor = _MOST / size if _LEAST < size < np.inf else np.float32(0)
        scales[row] = size / _MOST if size < np.inf else np.float32(np.nan)
        for deep in range(whole):
            _split(x, row, deep * DEPTH, factor, digits, deep, DIGITS * row)
        if whole < digits.shape[1]:
            _split(padded, 0, 0, factor, digits, whole, DIGITS * row)


def _typed_largest(typing: Any, x: Any, row: Any, end: Any) -> Intrinsic:
    """The bits of max |x[row, :end]|; `end` is a multiple of SIDE."""
    return types.int32(x, types.int64, types.int64), _generate_largest


def _typed_split(
    typing: Any, x: Any, row: Any, place: Any, factor: Any, digits: Any, deep: Any, line: Any
) -> Intrinsic:
    """Digits of factor · x[row, place : place + DEPTH], to lines from `line` on; `digits` is contiguous."""
    whole = types.int64
    return types.void(x, whole, whole, types.float32, digits, whole, whole), _generate_split


_largest: Callable[[Floats, int, int], int] = cast(Any, intrinsic(_typed_largest))
_split: Callable[[Floats, int, int, np.float32, Digits, int, int], None] = cast(Any, intrinsic(_typed_split))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    x, row, end = unpacked(context, builder, signature, arguments)
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
    x, row, place, factor, digits, deep, line = unpacked(context, builder, signature, arguments)
    source = builder.gep(row_of(builder, x, row), [place])
    factors = broadcast(builder, factor, SIDE)
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
            # Rounds, since the digit that was taken may be negative.
            left = builder.ashr(builder.add(left, _WHOLES([128] * SIDE)), _WHOLES([8] * SIDE))
    return context.get_dummy_value()
