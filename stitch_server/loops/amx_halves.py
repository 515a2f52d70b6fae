"""Products of tiles of bfloat16, summed in float32: four times as many a second as vectors have.

Numbers come in parts (`parts.py`); every pair of parts whose product counts is multiplied, six of nine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from stitch_server.loops.amx import LINE, SIDE, SUMS, TILE, TILES, at, instruct
from stitch_server.loops.numbers import Floats, Numbers
from stitch_server.loops.parts import PARTS, Halves, Pairs
from stitch_server.loops.vectors import INT8, INT64, Generated, each_case, fetch, opened
from stitch_server.processor import knows_tiles

# Registers: sums, then rows, then weights.
_ROWS, _WEIGHTS = SUMS, SUMS + TILES
# Which parts of rows and weights are multiplied, the smallest products first, in an order that loads few tiles anew.
_PRODUCTS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def _typed_multiply_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    deep: Any,
    parts: Any,
    count: Any,
    sums: Any,
    ahead: Any,
    panel: Any,
    place: Any,
    fetched: Any,
) -> Generated:
    """sums[r, o] = Σ rows[tile: r, k] · parts[o, k] over `count` tiles of inputs, those of rows from `deep` on.

    Of 1 to TILES tiles of rows and TILES panels: `rows` `[tiles of rows, tiles of inputs, PARTS, SIDE, 2 * SIDE]`,
    `parts` `[TILES, at least count, PARTS, SIDE, SIDE]`, `sums` `[any, TILES * SIDE]`, all in one piece.
    Meanwhile weights come to the second cache: with each tile of inputs so many more cache lines of ahead[panel,
    place:], and of the panel behind it.
    """
    whole = types.int64
    kind = types.void(rows, whole, whole, whole, parts, whole, sums, ahead, whole, whole, whole)
    return kind, _multiply_tiles


_Multiply = Callable[[Halves, int, int, int, Pairs, int, Floats, Numbers, int, int, int], None]
multiply_tiles: _Multiply = cast(Any, intrinsic(_typed_multiply_tiles))


def _multiply_tiles(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not knows_tiles():
        # Never called, and nothing that this processor could be told.
        return context.get_dummy_value()
    given = opened(context, builder, signature, arguments)
    rows, tile, tiles, deep, parts, count, sums, ahead, panel, place, fetched = given
    across = builder.mul(builder.extract_value(rows.shape, 1), INT64(PARTS * TILE))
    begin = builder.add(builder.mul(tile, across), builder.mul(deep, INT64(PARTS * TILE)))
    lines = [at(builder, rows.data, builder.add(begin, builder.mul(across, INT64(n)))) for n in range(TILES)]
    apart = builder.extract_value(parts.strides, 0)
    panels = [at(builder, parts.data, builder.mul(apart, INT64(n))) for n in range(TILES)]
    following = builder.extract_value(ahead.strides, 0)
    first = builder.add(builder.mul(panel, following), builder.mul(place, builder.extract_value(ahead.strides, 1)))
    later = [at(builder, ahead.data, builder.add(first, builder.mul(following, INT64(n)))) for n in range(TILES)]
    for number in each_case(builder, tiles, TILES):
        _sum(builder, lines[:number], panels, count, later, fetched)
        for line in range(number):
            for panel in range(TILES):
                target = at(builder, sums.data, INT64((line * SIDE * TILES + panel) * LINE))
                instruct(builder, "tilestored64", INT8(TILES * line + panel), target, INT64(TILES * LINE))
    return context.get_dummy_value()


def _sum(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    later: Sequence[ir.Value],
    fetched: ir.Value,
) -> None:
    """One loop over tiles of inputs, for these tiles of rows and panels; the sums stay in registers."""
    for line in range(len(lines)):
        for panel in range(len(panels)):
            instruct(builder, "tilezero", INT8(TILES * line + panel))
    with for_range(builder, count) as step:
        loaded: dict[int, int] = {}

        def load(register: int, addresses: Sequence[ir.Value], part: int) -> None:
            if loaded.get(register) != part:
                loaded[register] = part
                offset = builder.add(builder.mul(step.index, INT64(PARTS * TILE)), INT64(part * TILE))
                for number, address in enumerate(addresses):
                    instruct(
                        builder, "tileloadd64", INT8(register + number), builder.gep(address, [offset]), INT64(LINE)
                    )

        for of_rows, of_weights in _PRODUCTS:
            load(_ROWS, lines, of_rows)
            load(_WEIGHTS, panels, of_weights)
            for line in range(len(lines)):
                for panel in range(len(panels)):
                    registers = (TILES * line + panel, _ROWS + line, _WEIGHTS + panel)
                    instruct(builder, "tdpbf16ps", *map(INT8, registers))
        with for_range(builder, fetched) as line:
            offset = builder.mul(builder.add(builder.mul(step.index, fetched), line.index), INT64(LINE))
            for address in later:
                fetch(builder, builder.gep(address, [offset]))
