"""The VNNI microkernel for int4 weights (`int4_layout.py`), by rows in int8 digits (`digits.py`). Knows arrays alone.

Within a group all products are small integers, which the processor adds four at a time; no weight becomes wider than a
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.cpu.amx import SIDE
from stitch_server.cpu.features import knows_dots
from stitch_server.cpu.matmul.digits import DEPTH, DIGITS, Digits
from stitch_server.cpu.matmul.int4_groups import Int4Words, loaded_group, panel_at
from stitch_server.cpu.matmul.int4_layout import BITS, GROUP, MOST_STEPS
from stitch_server.cpu.matmul.panels import LANES
from stitch_server.cpu.scalars import Floats
from stitch_server.cpu.vectors import (
    INT8,
    INT32,
    INT64,
    Intrinsic,
    broadcast,
    each_case,
    floats,
    function,
    row_of,
    unpacked,
)

# Panels and rows of a register tile.
PANELS = 2
MOST_ROWS = 3
# Panels for a single row: more streams of memory at once.
PANELS_OF_ONE = 4

_WORDS, _FLOATS = ir.VectorType(INT32, LANES), floats(LANES)


def _typed_add_int4_products(
    typing: Any, weight: Any, panel: Any, ahead: Any, digits: Any, totals: Any, row: Any, rows: Any, sums: Any
) -> Intrinsic:
    """sums[r, o] = Σ weight[panel: o, k] · rows[row + r, k] for 1 to MOST_ROWS rows.

    Outputs are those of PANELS panels; where there are fewer, the last one is repeated. Rows are integers, whose digits
    are `[tiles of lines, tiles of inputs, SIDE, DEPTH]` and whose sums over groups `[all rows, groups]`; `sums`
    is `[at least rows, PANELS * LANES]`. All are contiguous. Panels from `ahead` on are prefetched
    meanwhile.
    """
    return _signature(weight, digits, totals, sums), partial(_add_int4_products, PANELS, MOST_ROWS)


def _typed_add_int4_products_of_one(
    typing: Any, weight: Any, panel: Any, ahead: Any, digits: Any, totals: Any, row: Any, rows: Any, sums: Any
) -> Intrinsic:
    """The same for one row and PANELS_OF_ONE panels."""
    return _signature(weight, digits, totals, sums), partial(_add_int4_products, PANELS_OF_ONE, 1)


_Product = Callable[[Int4Words, int, int, Digits, Floats, int, int, Floats], None]
add_int4_products: _Product = cast(Any, intrinsic(_typed_add_int4_products))
add_int4_products_of_one: _Product = cast(Any, intrinsic(_typed_add_int4_products_of_one))


def _signature(weight: Any, digits: Any, totals: Any, sums: Any) -> Any:
    whole = types.int64
    return types.void(weight, whole, whole, digits, totals, whole, whole, sums)


def _add_int4_products(
    panels: int, most_rows: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not knows_dots():
        # Never called here: the processor lacks these instructions.
        return context.get_dummy_value()
    weight, panel, ahead, digits, totals, row, rows, sums = unpacked(context, builder, signature, arguments)
    last = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))

    def some_panels(first: ir.Value) -> list[ir.Value]:
        numbers = [builder.add(first, INT64(number)) for number in range(panels)]
        some = [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]
        return [panel_at(builder, weight, number) for number in some]

    strips = list(zip(some_panels(panel), some_panels(ahead), strict=True))
    groups = builder.extract_value(totals.shape, 1)
    for count in each_case(builder, rows, most_rows):
        numbers = [builder.add(row, INT64(number)) for number in range(count)]
        lines = [_lines(builder, digits, number) for number in numbers]
        _sum(builder, strips, lines, [row_of(builder, totals, number) for number in numbers], groups, sums.data)
    return context.get_dummy_value()


def _sum(
    builder: ir.IRBuilder,
    strips: Sequence[tuple[ir.Value, ir.Value]],
    lines: Sequence[Sequence[ir.Value]],
    totals: Sequence[ir.Value],
    groups: ir.Value,
    sums: ir.Value,
) -> None:
    """The loop over groups, for these panels, each with one to prefetch, and these rows' digits."""
    before, body, behind = builder.block, builder.append_basic_block("group"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    group = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in lines for _ in strips]
    opened_groups = [loaded_group(builder, panel, later, group) for panel, later in strips]
    steps = [_steps(builder, words) for words, _, _ in opened_groups]
    tile, half = builder.udiv(group, INT64(2)), builder.urem(group, INT64(2))
    offset = builder.add(builder.mul(tile, INT64(SIDE * DEPTH)), builder.mul(half, INT64(GROUP)))
    grown: list[ir.Value] = []
    for row, total in zip(lines, totals, strict=True):
        wholes = [[_WORDS([0] * LANES) for _ in strips] for _ in range(DIGITS)]
        for quad in range(GROUP // 4):
            for digit, line in enumerate(row):
                address = builder.gep(line, [builder.add(offset, INT64(4 * quad))])
                four = builder.load(builder.bitcast(address, INT32.as_pointer()), align=4)
                wholes[digit] = [
                    _added(builder, one, panel[quad], four) for one, panel in zip(wholes[digit], steps, strict=True)
                ]
        all_inputs = broadcast(builder, builder.load(builder.gep(total, [group])), LANES)
        for number, (_, step, least) in enumerate(opened_groups):
            products = _joined(builder, [digit[number] for digit in wholes])
            products = _multiplied(builder, products, step, running[len(grown)])
            grown.append(_multiplied(builder, all_inputs, least, products))
    following = builder.add(group, INT64(1))
    group.add_incoming(INT64(0), before)
    group.add_incoming(following, body)
    for earlier, later in zip(running, grown, strict=True):
        earlier.add_incoming(_FLOATS([0.0] * LANES), before)
        earlier.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, groups), body, behind)
    builder.position_at_end(behind)
    for number, total in enumerate(grown):
        target = builder.gep(sums, [INT64(number * LANES)])
        builder.store(total, builder.bitcast(target, _FLOATS.as_pointer()), align=4)


def _lines(builder: ir.IRBuilder, digits: Any, row: ir.Value) -> list[ir.Value]:
    """The addresses of a row's lines of digits."""
    found = []
    across = builder.mul(builder.extract_value(digits.shape, 1), INT64(SIDE * DEPTH))
    for digit in range(DIGITS):
        line = builder.add(builder.mul(row, INT64(DIGITS)), INT64(digit))
        tile, within = builder.udiv(line, INT64(SIDE)), builder.urem(line, INT64(SIDE))
        at = builder.add(builder.mul(tile, across), builder.mul(within, INT64(DEPTH)))
        found.append(builder.gep(digits.data, [at]))
    return found


def _steps(builder: ir.IRBuilder, words: Sequence[ir.Value]) -> list[ir.Value]:
    """Unpacks words to bytes: the steps of four inputs in each vector."""
    lower = _WORDS([int.from_bytes([MOST_STEPS] * 4)] * LANES)
    found = []
    for word in words:
        found += [builder.and_(word, lower), builder.and_(builder.lshr(word, _WORDS([BITS] * LANES)), lower)]
    return found


def _added(builder: ir.IRBuilder, wholes: ir.Value, steps: ir.Value, digits: ir.Value) -> ir.Value:
    """Adds four products of bytes to each sum (vpdpbusd)."""
    pieces = ir.VectorType(INT8, 4 * LANES)
    kind = ir.FunctionType(_WORDS, [_WORDS, pieces, pieces])
    nothing = _WORDS(ir.Undefined)
    one = builder.insert_element(nothing, digits, INT32(0))
    everywhere = builder.shuffle_vector(one, nothing, _WORDS([0] * LANES))
    operands = [wholes, builder.bitcast(steps, pieces), builder.bitcast(everywhere, pieces)]
    return builder.call(function(builder, kind, "llvm.x86.avx512.vpdpbusd.512"), operands)


def _joined(builder: ir.IRBuilder, wholes: Sequence[ir.Value]) -> ir.Value:
    """Joins the sums of three digits, lowest first, to one float32; two of them fit into an int32."""
    low, middle, high = wholes
    lower = builder.add(low, builder.shl(middle, _WORDS([8] * LANES)))
    upper = builder.sitofp(high, _FLOATS)
    return _multiplied(builder, upper, _FLOATS([65536.0] * LANES), builder.sitofp(lower, _FLOATS))


def _multiplied(builder: ir.IRBuilder, factor: ir.Value, value: ir.Value, total: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(function(builder, kind, f"llvm.fma.v{LANES}f32"), [factor, value, total])
