"""The AMX microkernel for int8 tiles, accumulated in int32: nothing is rounded.

Rows come in digits (`digits.py`), each of which is a line of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from stitch_server.cpu.amx import LINE, REGISTERS, SIDE, SUMS, TILE, TILES, at, instruct
from stitch_server.cpu.features import knows_tiles
from stitch_server.cpu.matmul.digits import Digits, Int8Quads, Int32s
from stitch_server.cpu.vectors import INT8, INT64, Intrinsic, each_case, prefetch, unpacked

# Panels of a call where there is a single tile of rows.
PANELS_OF_FEW = SUMS


def _typed_multiply_int8_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    weight: Any,
    panel: Any,
    sums: Any,
    ahead: Any,
    line: Any,
    prefetched: Any,
) -> Intrinsic:
    """sums[r, o] = Σ rows[tile: r, k] · weight[panel: o, k], of bytes, over all tiles of inputs.

    Of one tile of rows and PANELS_OF_FEW panels, or of TILES and as many; where there are fewer panels, the last one
    is repeated. `rows` `[tiles of rows, tiles of inputs, SIDE, 4 * SIDE]`, `weight` `[panels, SIDE * tiles of inputs,
    SIDE]`, `sums` `[any, panels * SIDE]`, all contiguous. Prefetches as many panels from `ahead` on: of
    each of their tiles `prefetched` lines from `line` on.
    """
    whole = types.int64
    return types.void(rows, whole, whole, weight, whole, sums, whole, whole, whole), _multiply_int8_tiles


_MultiplyInt8Tiles = Callable[[Digits, int, int, Int8Quads, int, Int32s, int, int, int], None]
multiply_int8_tiles: _MultiplyInt8Tiles = cast(Any, intrinsic(_typed_multiply_int8_tiles))


def _multiply_int8_tiles(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not knows_tiles():
        return context.get_dummy_value()
    rows, tile, tiles, weight, panel, sums, ahead, first, prefetched = unpacked(context, builder, signature, arguments)
    deep = builder.extract_value(rows.shape, 1)
    across, apart = builder.mul(deep, INT64(TILE)), builder.extract_value(weight.strides, 0)
    count = builder.extract_value(weight.shape, 0)
    last = builder.sub(count, INT64(1))
    for number in each_case(builder, tiles, TILES):
        panels = SUMS // number
        begin = builder.mul(tile, across)
        lines = [at(builder, rows.data, builder.add(begin, builder.mul(across, INT64(n)))) for n in range(number)]
        places = [_panel(builder, weight, builder.add(panel, INT64(n)), last, apart) for n in range(panels)]
        later = [_panel(builder, weight, builder.add(ahead, INT64(n)), last, apart) for n in range(panels)]
        _sum_int8(builder, lines, places, deep, later, first, prefetched)
        for register in range(SUMS):
            line, place = divmod(register, panels)
            target = at(builder, sums.data, INT64((line * SIDE * panels + place) * LINE))
            instruct(builder, "tilestored64", INT8(register), target, INT64(panels * LINE))
    return context.get_dummy_value()


def _panel(builder: ir.IRBuilder, weight: Any, number: ir.Value, last: ir.Value, apart: ir.Value) -> ir.Value:
    """The address of a panel, or of the last one."""
    number = builder.select(builder.icmp_signed("<", number, last), number, last)
    return at(builder, weight.data, builder.mul(number, apart))


def _sum_int8(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    later: Sequence[ir.Value],
    first: ir.Value,
    prefetched: ir.Value,
) -> None:
    """The loop over tiles of inputs; accumulators stay in registers."""
    for register in range(SUMS):
        instruct(builder, "tilezero", INT8(register))
    with for_range(builder, count) as step:
        offset = builder.mul(step.index, INT64(TILE))
        for number, address in enumerate(lines):
            instruct(builder, "tileloadd64", INT8(SUMS + number), builder.gep(address, [offset]), INT64(LINE))
        free = REGISTERS - SUMS - len(lines)
        for number, address in enumerate(panels):
            register = SUMS + len(lines) + number % free
            instruct(builder, "tileloadd64", INT8(register), builder.gep(address, [offset]), INT64(LINE))
            for row in range(len(lines)):
                instruct(builder, "tdpbssd", *map(INT8, (len(panels) * row + number, SUMS + row, register)))
        with for_range(builder, prefetched) as line:
            here = builder.add(offset, builder.mul(builder.add(first, line.index), INT64(LINE)))
            for address in later:
                prefetch(builder, builder.gep(address, [here]))
