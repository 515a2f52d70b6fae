"""Splits float32 into sums of three bfloat16, in the layout of AMX tiles. Knows arrays alone.

A float32 has 24 significant bits and a bfloat16 eight, so three of these hold one exactly. A product of two numbers is
then the sum of nine products, of which the three smallest, together below 2^-23 of it, are left out (`amx_bf16.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.amx import LINE, SIDE
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.vectors import INT32, INT64, Intrinsic, floats, row_of, unpacked, widened

# Bits of bfloat16, and pairs of them: inputs n and n + SIDE of a tile, the first one in the lower half. Rows have their
# inputs in the same order.
Bf16 = NDArray[np.uint16]
Bf16Pairs = NDArray[np.uint32]

# Bfloat16 of a float32.
PARTS = 3
# Inputs of a tile: a pair for each of its rows.
DEPTH = 2 * SIDE

_BITS = ir.VectorType(INT32, SIDE)
_UPPER, _HALF, _SIXTEEN = (_BITS([number] * SIDE) for number in (0xFFFF0000, 0x8000, 16))


@compiled()
def split_rows(x: Floats, parts: Bf16) -> None:
    """`[rows, inputs]` to `[tiles of rows, tiles of inputs, PARTS, SIDE, DEPTH]`, padded with zeros."""
    rows, inputs = x.shape
    whole = inputs // DEPTH
    padded = np.zeros((SIDE, DEPTH), np.float32)
    for tile in range(parts.shape[0]):
        lines = min(SIDE, rows - tile * SIDE)
        if lines < SIDE:
            parts[tile] = 0
        for deep in range(whole):
            for line in range(lines):
                split_line(x, tile * SIDE + line, deep * DEPTH, parts, tile, deep, line)
        if whole < parts.shape[1]:
            for line in range(lines):
                for place in range(whole * DEPTH, inputs):
                    padded[line, place - whole * DEPTH] = x[tile * SIDE + line, place]
                split_line(padded, line, 0, parts, tile, whole, line)


@compiled()
def split_weights(panel: Numbers, first: int, parts: Bf16Pairs) -> None:
    """Weights `[inputs, SIDE]` of one panel from input `first` on to `[tiles of inputs, PARTS, SIDE, SIDE]`."""
    for deep in range(len(parts)):
        place = first + deep * DEPTH
        if place + DEPTH <= len(panel):
            for pair in range(SIDE):
                _split_pair(panel, place + pair, parts, deep, pair)
        else:
            padded = np.zeros((DEPTH, SIDE), panel.dtype)
            for row in range(place, len(panel)):
                for lane in range(SIDE):
                    padded[row - place, lane] = panel[row, lane]
            for pair in range(SIDE):
                _split_pair(padded, pair, parts, deep, pair)


def _typed_split_line(
    typing: Any, x: Any, row: Any, place: Any, parts: Any, tile: Any, deep: Any, line: Any
) -> Intrinsic:
    """Parts of x[row, place : place + DEPTH] to a line of a tile of `parts`, which is contiguous."""
    whole = types.int64
    return types.void(x, whole, whole, parts, whole, whole, whole), _generate_split_line


def _typed_split_pair(typing: Any, panel: Any, place: Any, parts: Any, deep: Any, pair: Any) -> Intrinsic:
    """Parts of panel[place] and panel[place + SIDE] to a line of a tile of `parts`; both arrays are contiguous."""
    whole = types.int64
    return types.void(panel, whole, parts, whole, whole), _generate_split_pair


split_line: Callable[[Floats, int, int, Bf16, int, int, int], None] = cast(Any, intrinsic(_typed_split_line))
_split_pair: Callable[[Numbers, int, Bf16Pairs, int, int], None] = cast(Any, intrinsic(_typed_split_pair))


def pair_in_parts(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, target: ir.Value) -> None:
    """SIDE numbers at one address, and as many at another one, side by side to the same line of PARTS tiles."""
    put_pair(builder, widened(builder, first, SIDE), widened(builder, second, SIDE), target)


def put_pair(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, target: ir.Value) -> None:
    """The same, of two vectors."""
    both = (_parted(builder, numbers) for numbers in (first, second))
    for part, (lower, upper) in enumerate(zip(*both, strict=True)):
        paired = builder.or_(builder.lshr(lower, _SIXTEEN), builder.and_(upper, _UPPER))
        builder.store(paired, builder.gep(target, [INT64(part * SIDE)]), align=LINE)


def _generate_split_line(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    x, row, place, parts, tile, deep, line = unpacked(context, builder, signature, arguments)
    first = builder.gep(row_of(builder, x, row), [place])
    number = builder.add(builder.mul(tile, builder.extract_value(parts.shape, 1)), deep)
    pair_in_parts(builder, first, builder.gep(first, [INT64(SIDE)]), line_of(builder, parts, number, line))
    return context.get_dummy_value()


def _generate_split_pair(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    panel, place, parts, deep, pair = unpacked(context, builder, signature, arguments)
    first, second = (
        builder.gep(panel.data, [builder.mul(builder.add(place, INT64(apart)), INT64(SIDE))]) for apart in (0, SIDE)
    )
    pair_in_parts(builder, first, second, line_of(builder, parts, deep, pair))
    return context.get_dummy_value()


def line_of(builder: ir.IRBuilder, parts: Any, number: ir.Value, line: ir.Value) -> ir.Value:
    """The address of a line of the first part of a tile, by the tile's number."""
    tiles = builder.bitcast(parts.data, _BITS.as_pointer())
    return builder.gep(tiles, [builder.add(builder.mul(number, INT64(PARTS * SIDE)), line)])


def _parted(builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
    """The bits of PARTS numbers whose sum is `values`; the upper half of each is a bfloat16."""
    found = [builder.bitcast(values, _BITS)]
    while len(found) < PARTS:
        # The first part is rounded to the nearest, so that the rest has either sign.
        rounded = builder.add(found[-1], _HALF) if len(found) == 1 else found[-1]
        found[-1] = builder.and_(rounded, _UPPER)
        values = builder.fsub(values, builder.bitcast(found[-1], floats(SIDE)))
        found.append(builder.bitcast(values, _BITS))
    return found
