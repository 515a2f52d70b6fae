"""Products of tiles by AMX, the matrix unit of newer Intel processors: four times as many a second as vectors have.

It multiplies bfloat16 and sums in float32. Numbers come in parts (`parts.py`); every pair of parts whose product counts
is multiplied, six for float32 by float32 and three for float32 by numbers of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic

from stitch_server.loops.numbers import Floats, Numbers
from stitch_server.loops.parts import PARTS, SIDE, Halves, Pairs, count_of
from stitch_server.loops.vectors import INT8, INT64, Generated, each_case, fetch, function, opened
from stitch_server.processor import knows_tiles

# Tiles of rows, and of outputs, whose sums are in registers at the same time.
TILES = 2
# Bytes of a tile's line, and of a tile.
_LINE = 4 * SIDE
_TILE = SIDE * _LINE
# Registers: sums in the first four, then rows, then weights.
_ROWS, _WEIGHTS, _REGISTERS = TILES * TILES, TILES * TILES + TILES, 8
# Which parts of rows and weights are multiplied, the smallest products first, in an order that loads few tiles anew.
_PRODUCTS = {
    PARTS: ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)),
    1: ((2, 0), (1, 0), (0, 0)),
}


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
    `parts` `[TILES, at least count, parts of weight, SIDE, SIDE]`, `sums` `[any, TILES * SIDE]`, all in one piece.
    Meanwhile weights come to the second cache: with each tile of inputs so many more cache lines of ahead[panel,
    place:], and of the panel behind it.
    """
    whole = types.int64
    kind = types.void(rows, whole, whole, whole, parts, whole, sums, ahead, whole, whole, whole)
    return kind, partial(_multiply_tiles, count_of(ahead))


_Multiply = Callable[[Halves, int, int, int, Pairs, int, Floats, Numbers, int, int, int], None]
multiply_tiles: _Multiply = cast(Any, intrinsic(_typed_multiply_tiles))


def _multiply_tiles(
    weight_parts: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not knows_tiles():
        # Never called, and nothing that this processor could be told.
        return context.get_dummy_value()
    given = opened(context, builder, signature, arguments)
    rows, tile, tiles, deep, parts, count, sums, ahead, panel, place, fetched = given
    across = builder.mul(builder.extract_value(rows.shape, 1), INT64(PARTS * _TILE))
    begin = builder.add(builder.mul(tile, across), builder.mul(deep, INT64(PARTS * _TILE)))
    lines = [_at(builder, rows.data, builder.add(begin, builder.mul(across, INT64(n)))) for n in range(TILES)]
    apart = builder.extract_value(parts.strides, 0)
    panels = [_at(builder, parts.data, builder.mul(apart, INT64(n))) for n in range(TILES)]
    following = builder.extract_value(ahead.strides, 0)
    first = builder.add(builder.mul(panel, following), builder.mul(place, builder.extract_value(ahead.strides, 1)))
    later = [_at(builder, ahead.data, builder.add(first, builder.mul(following, INT64(n)))) for n in range(TILES)]
    for number in each_case(builder, tiles, TILES):
        _sum(builder, lines[:number], panels, weight_parts, count, later, fetched)
        for line in range(number):
            for panel in range(TILES):
                target = _at(builder, sums.data, INT64((line * SIDE * TILES + panel) * _LINE))
                _instruct(builder, "tilestored64", INT8(TILES * line + panel), target, INT64(TILES * _LINE))
    return context.get_dummy_value()


def _typed_open(typing: Any) -> Generated:
    """Lets this thread use tiles, all of them whole."""
    return types.void(), _open


def _typed_close(typing: Any) -> Generated:
    """Spares whoever gets the core next from keeping them."""
    return types.void(), _close


open_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_open))
close_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_close))


def _open(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not knows_tiles():
        return context.get_dummy_value()
    palette = bytearray(64)
    palette[0] = 1
    for register in range(_REGISTERS):
        palette[16 + 2 * register] = _LINE
        palette[48 + register] = SIDE
    kept = alloca_once_value(builder, ir.Constant(ir.ArrayType(INT8, len(palette)), palette))  # type: ignore[no-untyped-call]
    _instruct(builder, "ldtilecfg", builder.bitcast(kept, INT8.as_pointer()))
    return context.get_dummy_value()


def _close(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if knows_tiles():
        _instruct(builder, "tilerelease")
    return context.get_dummy_value()


def _sum(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    weight_parts: int,
    count: ir.Value,
    later: Sequence[ir.Value],
    fetched: ir.Value,
) -> None:
    """One loop over tiles of inputs, for these tiles of rows and panels; the sums stay in registers."""
    for line in range(len(lines)):
        for panel in range(len(panels)):
            _instruct(builder, "tilezero", INT8(TILES * line + panel))
    before, body, behind = builder.block, builder.append_basic_block("deep"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    place = builder.phi(INT64)
    loaded: dict[int, int] = {}

    def load(register: int, addresses: Sequence[ir.Value], parts: int, part: int) -> None:
        if loaded.get(register) != part:
            loaded[register] = part
            offset = builder.add(builder.mul(place, INT64(parts * _TILE)), INT64(part * _TILE))
            for number, address in enumerate(addresses):
                _instruct(builder, "tileloadd64", INT8(register + number), builder.gep(address, [offset]), INT64(_LINE))

    for of_rows, of_weights in _PRODUCTS[weight_parts]:
        load(_ROWS, lines, PARTS, of_rows)
        load(_WEIGHTS, panels, weight_parts, of_weights)
        for line in range(len(lines)):
            for panel in range(len(panels)):
                registers = (TILES * line + panel, _ROWS + line, _WEIGHTS + panel)
                _instruct(builder, "tdpbf16ps", *map(INT8, registers))
    with for_range(builder, fetched) as loop:
        offset = builder.mul(builder.add(builder.mul(place, fetched), loop.index), INT64(_LINE))
        for address in later:
            fetch(builder, builder.gep(address, [offset]))
    following = builder.add(place, INT64(1))
    place.add_incoming(INT64(0), before)
    place.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, behind)
    builder.position_at_end(behind)


def _at(builder: ir.IRBuilder, data: ir.Value, offset: ir.Value) -> ir.Value:
    """An address so many bytes behind another one."""
    return builder.gep(builder.bitcast(data, INT8.as_pointer()), [offset])


def _instruct(builder: ir.IRBuilder, name: str, *operands: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(function(builder, kind, f"llvm.x86.{name}"), operands)
