"""Products of tiles of bytes, summed in whole numbers: nothing is rounded.

Rows come in digits (`digits.py`), each of which has a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from stitch_server.loops.amx import LINE, REGISTERS, SIDE, SUMS, TILE, TILES, at, instruct
from stitch_server.loops.digits import Digits, Quads, Wholes
from stitch_server.loops.vectors import INT8, INT64, Generated, each_case, fetch, opened
from stitch_server.processor import knows_tiles

# Panels whose sums are in registers with those of a single tile of rows.
PANELS_OF_FEW = SUMS


def _typed_multiply_bytes(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    weight: Any,
    panel: Any,
    sums: Any,
    ahead: Any,
    line: Any,
    fetched: Any,
) -> Generated:
    """sums[r, o] = Σ rows[tile: r, k] · weight[panel: o, k], of bytes, over all tiles of inputs.

    Of one tile of rows and PANELS_OF_FEW panels, or of TILES and as many; where there are fewer panels, the last one
    comes again. `rows` `[tiles of rows, tiles of inputs, SIDE, 4 * SIDE]`, `weight` `[panels, SIDE * tiles of inputs,
    SIDE]`, `sums` `[any, panels * SIDE]`, all in one piece. Meanwhile as many panels from `ahead` on come to the second
    cache: of each of their tiles so many lines from `line` on.
    """
    whole = types.int64
    return types.void(rows, whole, whole, weight, whole, sums, whole, whole, whole), _multiply_bytes


_MultiplyBytes = Callable[[Digits, int, int, Quads, int, Wholes, int, int, int], None]
multiply_bytes: _MultiplyBytes = cast(Any, intrinsic(_typed_multiply_bytes))


def _multiply_bytes(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not knows_tiles():
        return context.get_dummy_value()
    rows, tile, tiles, weight, panel, sums, ahead, first, fetched = opened(context, builder, signature, arguments)
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
        _sum_bytes(builder, lines, places, deep, later, first, fetched)
        for register in range(SUMS):
            line, place = divmod(register, panels)
            target = at(builder, sums.data, INT64((line * SIDE * panels + place) * LINE))
            instruct(builder, "tilestored64", INT8(register), target, INT64(panels * LINE))
    return context.get_dummy_value()


def _panel(builder: ir.IRBuilder, weight: Any, number: ir.Value, last: ir.Value, apart: ir.Value) -> ir.Value:
    """Where a panel begins, or the last one."""
    number = builder.select(builder.icmp_signed("<", number, last), number, last)
    return at(builder, weight.data, builder.mul(number, apart))


def _sum_bytes(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    later: Sequence[ir.Value],
    first: ir.Value,
    fetched: ir.Value,
) -> None:
    """One loop over tiles of inputs; the sums stay in registers."""
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
        with for_range(builder, fetched) as line:
            here = builder.add(offset, builder.mul(builder.add(first, line.index), INT64(LINE)))
            for address in later:
                fetch(builder, builder.gep(address, [here]))
