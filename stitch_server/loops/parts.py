"""Float32 as sums of bfloat16, in the form that tiles take. Knows arrays alone.

A float32 has 24 bits, a bfloat16 eight of them, so three of these make one without loss. A product of two numbers is
then the sum of nine products, of which the three smallest, together below 2^-23 of it, are left out (`amx_halves.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.loops.amx import LINE, SIDE
from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers
from stitch_server.loops.vectors import INT32, INT64, Generated, floats, opened, row_of, widened

# Bits of bfloat16, and pairs of them, for inputs n and n + SIDE of a tile, the first one's in the lower half. Lines of
# rows have their inputs in the same order.
Halves = NDArray[np.uint16]
Pairs = NDArray[np.uint32]

# Of a float32.
PARTS = 3
# Inputs of a tile: a pair for each of its outputs.
DEPTH = 2 * SIDE

_BITS = ir.VectorType(INT32, SIDE)
_UPPER, _HALF, _SIXTEEN = (_BITS([number] * SIDE) for number in (0xFFFF0000, 0x8000, 16))


@compiled()
def split_rows(x: Floats, parts: Halves) -> None:
    """`[rows, inputs]` to `[tiles of rows, tiles of inputs, PARTS, SIDE, DEPTH]`, filled up with zeros."""
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
            padded[:lines, : inputs - whole * DEPTH] = x[tile * SIDE : tile * SIDE + lines, whole * DEPTH :]
            for line in range(lines):
                split_line(padded, line, 0, parts, tile, whole, line)


@compiled()
def split_weights(panel: Numbers, first: int, parts: Pairs) -> None:
    """Weights `[inputs, SIDE]` of one panel from input `first` on to `[tiles of inputs, PARTS, SIDE, SIDE]`."""
    for deep in range(len(parts)):
        place = first + deep * DEPTH
        if place + DEPTH <= len(panel):
            for pair in range(SIDE):
                _split_pair(panel, place + pair, parts, deep, pair)
        else:
            padded = np.zeros((DEPTH, SIDE), panel.dtype)
            padded[: len(panel) - place] = panel[place:]
            for pair in range(SIDE):
                _split_pair(padded, pair, parts, deep, pair)


def _typed_split_line(
    typing: Any, x: Any, row: Any, place: Any, parts: Any, tile: Any, deep: Any, line: Any
) -> Generated:
    """Parts of x[row, place : place + DEPTH] to a line of a tile of `parts`, which lies in one piece."""
    whole = types.int64
    return types.void(x, whole, whole, parts, whole, whole, whole), _generate_split_line


def _typed_split_pair(typing: Any, panel: Any, place: Any, parts: Any, deep: Any, pair: Any) -> Generated:
    """Parts of panel[place] and panel[place + SIDE] to a line of a tile of `parts`, both of which lie in one piece."""
    whole = types.int64
    return types.void(panel, whole, parts, whole, whole), _generate_split_pair


split_line: Callable[[Floats, int, int, Halves, int, int, int], None] = cast(Any, intrinsic(_typed_split_line))
_split_pair: Callable[[Numbers, int, Pairs, int, int], None] = cast(Any, intrinsic(_typed_split_pair))


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
    x, row, place, parts, tile, deep, line = opened(context, builder, signature, arguments)
    first = builder.gep(row_of(builder, x, row), [place])
    number = builder.add(builder.mul(tile, builder.extract_value(parts.shape, 1)), deep)
    pair_in_parts(builder, first, builder.gep(first, [INT64(SIDE)]), line_of(builder, parts, number, line))
    return context.get_dummy_value()


def _generate_split_pair(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    panel, place, parts, deep, pair = opened(context, builder, signature, arguments)
    first, second = (
        builder.gep(panel.data, [builder.mul(builder.add(place, INT64(apart)), INT64(SIDE))]) for apart in (0, SIDE)
    )
    pair_in_parts(builder, first, second, line_of(builder, parts, deep, pair))
    return context.get_dummy_value()


def line_of(builder: ir.IRBuilder, parts: Any, number: ir.Value, line: ir.Value) -> ir.Value:
    """Where a line of a tile in parts begins, by the number of that tile."""
    tiles = builder.bitcast(parts.data, _BITS.as_pointer())
    return builder.gep(tiles, [builder.add(builder.mul(number, INT64(PARTS * SIDE)), line)])


def _parted(builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
    """The bits of PARTS numbers whose sum is `values`; what counts of each is its upper half."""
    found = [builder.bitcast(values, _BITS)]
    while len(found) < PARTS:
        # The first one to the nearest, so that what is left is as often above as below it.
        rounded = builder.add(found[-1], _HALF) if len(found) == 1 else found[-1]
        found[-1] = builder.and_(rounded, _UPPER)
        values = builder.fsub(values, builder.bitcast(found[-1], floats(SIDE)))
        found.append(builder.bitcast(values, _BITS))
    return found
