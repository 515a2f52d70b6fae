"""Matmuls by int4 weights (`int4_layout.py`).

A few rows are split into int8 digits and multiplied by VNNI, which adds four products of small integers at once: no
weight becomes wider than a byte. Many rows share weights that are dequantized a strip at a time, with the same results,
to the last bit, as by float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import Instructions, has_vnni
from stitch_server.cpu.matmul.float32 import (
    FloatWorkspace,
    block_rows,
    matmul_strip,
    new_float_workspace,
    prepare_float,
    release_float,
    write_strip,
)
from stitch_server.cpu.matmul.int4_layout import (
    INT4_BITS,
    INT4_GROUP,
    INT4_MAX_STEPS,
    INT4_SHIFTS,
    INT4_WORD_INPUTS,
    INT4_WORDS,
)
from stitch_server.cpu.matmul.int8 import DIGITS, INT8_TILE_INPUTS, Digits, split_into_digits
from stitch_server.cpu.matmul.panels import PANEL_OUTPUTS, Matrix
from stitch_server.cpu.scalars import Floats
from stitch_server.cpu.simd import (
    INT8,
    INT16,
    INT32,
    INT64,
    TILE_SIDE,
    Intrinsic,
    broadcast,
    cache_aligned,
    declare_function,
    float_vector,
    prefetch,
    row_of,
    switch_cases,
    unpack_arrays,
)

# [panels, words, PANEL_OUTPUTS]
Int4Words = NDArray[np.uint32]

_WORDS, _FLOATS = ir.VectorType(INT32, PANEL_OUTPUTS), float_vector(PANEL_OUTPUTS)


@compiled()
def dequantize(weight: Int4Words, panel: int, next_panel: int, wide: Floats) -> None:
    """Dequantizes panels from `panel` on to `wide` `[panels, inputs, PANEL_OUTPUTS]`.

    Where there are fewer panels, the last one is repeated. Panels from `next_panel` on are prefetched meanwhile.
    """
    last = len(weight) - 1
    for number in range(len(wide)):
        this, following = min(panel + number, last), min(next_panel + number, last)
        for group in range(wide.shape[1] // INT4_GROUP):
            _dequantize(weight, this, following, group, wide, number)


def _typed_dequantize(
    typing: Any, weight: Any, panel: Any, next_panel: Any, group: Any, wide: Any, number: Any
) -> Intrinsic:
    """Dequantizes one group of weight[panel] to wide[number]; both arrays are contiguous."""
    int64 = types.int64
    return types.void(weight, int64, int64, int64, wide, int64), _generate_dequantize


_dequantize: Callable[[Int4Words, int, int, int, Floats, int], None] = cast(Any, intrinsic(_typed_dequantize))


def _generate_dequantize(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    weight, panel, next_panel, group, wide, number = unpack_arrays(context, builder, signature, arguments)
    words, step, least = loaded_group(
        builder, panel_at(builder, weight, panel), panel_at(builder, weight, next_panel), group
    )
    inputs = builder.mul(number, builder.extract_value(wide.shape, 1))
    inputs = builder.add(inputs, builder.mul(group, INT64(INT4_GROUP)))
    for column in range(INT4_GROUP):
        shifted = builder.lshr(
            words[column // INT4_WORD_INPUTS], _WORDS([INT4_SHIFTS[column % INT4_WORD_INPUTS]] * PANEL_OUTPUTS)
        )
        steps = builder.sitofp(builder.and_(shifted, _WORDS([INT4_MAX_STEPS] * PANEL_OUTPUTS)), _FLOATS)
        # A product of four bits and eleven is exact, so this is rounded once.
        vector = builder.fadd(builder.fmul(steps, step), least)
        target = builder.gep(wide.data, [builder.mul(builder.add(inputs, INT64(column)), INT64(PANEL_OUTPUTS))])
        builder.store(vector, builder.bitcast(target, _FLOATS.as_pointer()), align=4)
    return context.get_dummy_value()


def panel_at(builder: ir.IRBuilder, weight: Any, number: ir.Value) -> ir.Value:
    """Returns the address of a panel."""
    size = builder.mul(builder.extract_value(weight.shape, 1), INT64(PANEL_OUTPUTS))
    return builder.gep(weight.data, [builder.mul(number, size)])


def loaded_group(
    builder: ir.IRBuilder, panel: ir.Value, next_panel: ir.Value, group: ir.Value
) -> tuple[list[ir.Value], ir.Value, ir.Value]:
    """Returns words, step and least weight of a panel's group; prefetches those of the next panel."""
    begin = builder.mul(group, INT64(INT4_WORDS * PANEL_OUTPUTS))
    offsets = [builder.add(begin, INT64(number * PANEL_OUTPUTS)) for number in range(INT4_WORDS)]
    for offset in offsets:
        prefetch(builder, builder.gep(next_panel, [offset]))
    *words, pair = (
        builder.load(builder.bitcast(builder.gep(panel, [offset]), _WORDS.as_pointer()), align=4) for offset in offsets
    )
    return words, _half(builder, pair), _half(builder, builder.lshr(pair, _WORDS([16] * PANEL_OUTPUTS)))


def _half(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """Returns the lower halves, float16, as float32."""
    lower = builder.trunc(words, ir.VectorType(INT16, PANEL_OUTPUTS))
    return builder.fpext(builder.bitcast(lower, ir.VectorType(ir.HalfType(), PANEL_OUTPUTS)), _FLOATS)


# Panels and rows of a register tile.
PANELS = 2
MAX_ROWS = 3
# Panels for a single row: more streams of memory at once.
ONE_ROW_PANELS = 4


def _typed_dot_int4_panels(
    typing: Any, weight: Any, panel: Any, next_panel: Any, digits: Any, totals: Any, row: Any, rows: Any, sums: Any
) -> Intrinsic:
    """sums[r, o] = Σ weight[panel: o, k] · rows[row + r, k] for 1 to MAX_ROWS rows.

    Outputs are those of PANELS panels; where there are fewer, the last one is repeated. Rows are integers, whose digits
    are `[tiles of lines, tiles of inputs, TILE_SIDE, INT8_TILE_INPUTS]` and whose sums over groups are
    `[all rows, groups]`; `sums` is `[at least rows, PANELS * PANEL_OUTPUTS]`. All are contiguous. Panels from
    `next_panel` on are prefetched meanwhile.
    """
    return _signature(weight, digits, totals, sums), partial(_generate_dot_int4_panels, PANELS, MAX_ROWS)


def _typed_dot_int4_panels_one_row(
    typing: Any, weight: Any, panel: Any, next_panel: Any, digits: Any, totals: Any, row: Any, rows: Any, sums: Any
) -> Intrinsic:
    """Does the same for one row and ONE_ROW_PANELS panels."""
    return _signature(weight, digits, totals, sums), partial(_generate_dot_int4_panels, ONE_ROW_PANELS, 1)


_FmaPanels = Callable[[Int4Words, int, int, Digits, Floats, int, int, Floats], None]
dot_int4_panels: _FmaPanels = cast(Any, intrinsic(_typed_dot_int4_panels))
dot_int4_panels_one_row: _FmaPanels = cast(Any, intrinsic(_typed_dot_int4_panels_one_row))


def _signature(weight: Any, digits: Any, totals: Any, sums: Any) -> Any:
    int64 = types.int64
    return types.void(weight, int64, int64, digits, totals, int64, int64, sums)


def _generate_dot_int4_panels(
    panels: int, most_rows: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not has_vnni():
        # Never called here: the CPU lacks these instructions.
        return context.get_dummy_value()
    weight, panel, next_panel, digits, totals, row, rows, sums = unpack_arrays(context, builder, signature, arguments)
    last = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))

    def panel_addresses(first: ir.Value) -> list[ir.Value]:
        numbers = [builder.add(first, INT64(number)) for number in range(panels)]
        clamped = [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]
        return [panel_at(builder, weight, number) for number in clamped]

    strips = list(zip(panel_addresses(panel), panel_addresses(next_panel), strict=True))
    groups = builder.extract_value(totals.shape, 1)
    for count in switch_cases(builder, rows, most_rows):
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
    """Emits the loop over groups, for these panels, each with one to prefetch, and these rows' digits."""
    before, body, end_block = builder.block, builder.append_basic_block("group"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    group = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in lines for _ in strips]
    opened_groups = [loaded_group(builder, panel, next_panel, group) for panel, next_panel in strips]
    steps = [_steps(builder, words) for words, _, _ in opened_groups]
    tile, half = builder.udiv(group, INT64(2)), builder.urem(group, INT64(2))
    offset = builder.add(builder.mul(tile, INT64(TILE_SIDE * INT8_TILE_INPUTS)), builder.mul(half, INT64(INT4_GROUP)))
    next_sums: list[ir.Value] = []
    for row, total in zip(lines, totals, strict=True):
        wholes = [[_WORDS([0] * PANEL_OUTPUTS) for _ in strips] for _ in range(DIGITS)]
        for quad in range(INT4_GROUP // 4):
            for digit, line in enumerate(row):
                address = builder.gep(line, [builder.add(offset, INT64(4 * quad))])
                four = builder.load(builder.bitcast(address, INT32.as_pointer()), align=4)
                wholes[digit] = [
                    _added(builder, one, panel[quad], four) for one, panel in zip(wholes[digit], steps, strict=True)
                ]
        all_inputs = broadcast(builder, builder.load(builder.gep(total, [group])), PANEL_OUTPUTS)
        for number, (_, step, least) in enumerate(opened_groups):
            products = _joined(builder, [digit[number] for digit in wholes])
            products = _multiplied(builder, products, step, running[len(next_sums)])
            next_sums.append(_multiplied(builder, all_inputs, least, products))
    following = builder.add(group, INT64(1))
    group.add_incoming(INT64(0), before)
    group.add_incoming(following, body)
    for running_sum, sum_now in zip(running, next_sums, strict=True):
        running_sum.add_incoming(_FLOATS([0.0] * PANEL_OUTPUTS), before)
        running_sum.add_incoming(sum_now, body)
    builder.cbranch(builder.icmp_signed("<", following, groups), body, end_block)
    builder.position_at_end(end_block)
    for number, total in enumerate(next_sums):
        target = builder.gep(sums, [INT64(number * PANEL_OUTPUTS)])
        builder.store(total, builder.bitcast(target, _FLOATS.as_pointer()), align=4)


def _lines(builder: ir.IRBuilder, digits: Any, row: ir.Value) -> list[ir.Value]:
    """Returns the addresses of a row's lines of digits."""
    found = []
    tile_row_stride = builder.mul(builder.extract_value(digits.shape, 1), INT64(TILE_SIDE * INT8_TILE_INPUTS))
    for digit in range(DIGITS):
        line = builder.add(builder.mul(row, INT64(DIGITS)), INT64(digit))
        tile, within = builder.udiv(line, INT64(TILE_SIDE)), builder.urem(line, INT64(TILE_SIDE))
        byte_offset = builder.add(builder.mul(tile, tile_row_stride), builder.mul(within, INT64(INT8_TILE_INPUTS)))
        found.append(builder.gep(digits.data, [byte_offset]))
    return found


def _steps(builder: ir.IRBuilder, words: Sequence[ir.Value]) -> list[ir.Value]:
    """Unpacks words to bytes: the steps of four inputs in each vector."""
    lower = _WORDS([int.from_bytes([INT4_MAX_STEPS] * 4)] * PANEL_OUTPUTS)
    found = []
    for word in words:
        found += [
            builder.and_(word, lower),
            builder.and_(builder.lshr(word, _WORDS([INT4_BITS] * PANEL_OUTPUTS)), lower),
        ]
    return found


def _added(builder: ir.IRBuilder, wholes: ir.Value, steps: ir.Value, digits: ir.Value) -> ir.Value:
    """Adds four products of int8 to each sum (vpdpbusd)."""
    pieces = ir.VectorType(INT8, 4 * PANEL_OUTPUTS)
    kind = ir.FunctionType(_WORDS, [_WORDS, pieces, pieces])
    nothing = _WORDS(ir.Undefined)
    one = builder.insert_element(nothing, digits, INT32(0))
    everywhere = builder.shuffle_vector(one, nothing, _WORDS([0] * PANEL_OUTPUTS))
    operands = [wholes, builder.bitcast(steps, pieces), builder.bitcast(everywhere, pieces)]
    return builder.call(declare_function(builder, kind, "llvm.x86.avx512.vpdpbusd.512"), operands)


def _joined(builder: ir.IRBuilder, wholes: Sequence[ir.Value]) -> ir.Value:
    """Joins the sums of three digits, lowest first, to one float32; two of them fit into an int32."""
    low, middle, high = wholes
    lower = builder.add(low, builder.shl(middle, _WORDS([8] * PANEL_OUTPUTS)))
    upper = builder.sitofp(high, _FLOATS)
    return _multiplied(builder, upper, _FLOATS([65536.0] * PANEL_OUTPUTS), builder.sitofp(lower, _FLOATS))


def _multiplied(builder: ir.IRBuilder, factor: ir.Value, value: ir.Value, total: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(declare_function(builder, kind, f"llvm.fma.v{PANEL_OUTPUTS}f32"), [factor, value, total])


class Int4Workspace(NamedTuple):
    """One thread's buffers."""

    # Of the matmul by dequantized weights.
    buffers: FloatWorkspace
    # The dequantized weights of a strip.
    wide: Floats
    # The digits of all rows, where VNNI multiplies; reshaped for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # [rows, groups]: sums of each row's digits over a group of inputs.
    totals: Floats
    # [rows, outputs] of one call.
    sums: Floats


@compiled()
def new_int4_workspace(rows: int, inputs: int, instructions: Instructions, threads: int) -> Int4Workspace:
    """Allocates buffers for `rows` rows of up to `inputs` inputs."""
    buffers, split = (
        new_float_workspace(rows, inputs, instructions.amx, threads),
        rows if instructions.vnni and not instructions.amx else 0,
    )
    wide = buffers.sums.shape[1] * _group_count(inputs) * INT4_GROUP if split == 0 else 0
    at_once, width = (1, ONE_ROW_PANELS * PANEL_OUTPUTS) if rows == 1 else (MAX_ROWS, PANELS * PANEL_OUTPUTS)
    return Int4Workspace(
        buffers,
        cache_aligned(4 * wide).view(np.float32),
        cache_aligned(_tiles(split) * -(-inputs // INT8_TILE_INPUTS) * TILE_SIDE * INT8_TILE_INPUTS).view(np.int8),
        np.empty(split, np.float32),
        np.empty(split * _group_count(inputs), np.float32),
        cache_aligned(4 * at_once * width).view(np.float32).reshape(at_once, width),
    )


@compiled()
def release_int4(workspace: Int4Workspace) -> None:
    """See `dispatch.release_workspace`."""
    release_float(workspace.buffers)


@compiled()
def prepare_int4(x: Floats, workspace: Int4Workspace) -> None:
    """See `dispatch.prepare_input`."""
    if workspace.digits.size == 0:
        prepare_float(x, workspace.buffers)
        return
    rows, inputs = x.shape
    digits, totals = _digits(workspace, rows, inputs), _totals(workspace, rows, inputs)
    split_into_digits(x, digits, workspace.scales)
    for row in range(rows):
        for group in range(_group_count(inputs)):
            totals[row, group] = _total(digits, DIGITS * row, group)


@compiled(forceinline=True)
def matmul_int4(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int4Workspace,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """See `dispatch.matmul`."""
    if workspace.digits.size == 0:
        _matmul_dequantized(x, matrix, first, end, workspace, result, column, accumulate)
        return
    digits, totals = _digits(workspace, len(x), x.shape[1]), _totals(workspace, len(x), x.shape[1])
    at_once, width = workspace.sums.shape
    for output in range(first, end, width):
        next_output = output + width if output + width < end else first + workspace.buffers.threads * (end - first)
        panel, next_panel, count = output // PANEL_OUTPUTS, next_output // PANEL_OUTPUTS, min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            if at_once == 1:
                dot_int4_panels_one_row(matrix.weight, panel, next_panel, digits, totals, top, rows, workspace.sums)
            else:
                dot_int4_panels(matrix.weight, panel, next_panel, digits, totals, top, rows, workspace.sums)
            for row in range(rows):
                for number in range(width):
                    workspace.sums[row, number] *= workspace.scales[top + row]
            write_strip(workspace.sums, rows, matrix, output, count, result, top, column + output - first, accumulate)


@compiled()
def _matmul_dequantized(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int4Workspace,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    buffers = workspace.buffers
    width, at_once = buffers.sums.shape[1], block_rows(len(x), x.shape[1], buffers)
    panels, filled = width // PANEL_OUTPUTS, _group_count(x.shape[1]) * INT4_GROUP
    wide = workspace.wide[: width * filled].reshape(panels, filled, PANEL_OUTPUTS)
    for output in range(first, end, width):
        next_output = output + width if output + width < end else first + buffers.threads * (end - first)
        dequantize(matrix.weight, output // PANEL_OUTPUTS, next_output // PANEL_OUTPUTS, wide)
        count = min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            matmul_strip(x, top, rows, wide, 0, panels, buffers)
            write_strip(buffers.sums, rows, matrix, output, count, result, top, column + output - first, accumulate)


@compiled()
def _total(digits: Digits, line: int, group: int) -> np.int32:
    """Returns the sum of a group's integers, whose lowest digits are in this line."""
    begin, total = group * INT4_GROUP % INT8_TILE_INPUTS, np.int32(0)
    for digit in range(DIGITS - 1, -1, -1):
        tile, within = divmod(line + digit, TILE_SIDE)
        digit_sum = np.int32(0)
        for value in digits[tile, group * INT4_GROUP // INT8_TILE_INPUTS, within, begin : begin + INT4_GROUP]:
            digit_sum += np.int32(value)
        total = np.int32(256) * total + digit_sum
    return total


@compiled()
def _tiles(rows: int) -> int:
    """Returns the tiles of the digits of `rows` rows."""
    return -(-DIGITS * rows // TILE_SIDE)


@compiled(forceinline=True)
def _digits(workspace: Int4Workspace, rows: int, inputs: int) -> Digits:
    """Returns the buffer, shaped for these rows."""
    tiles, k_tiles = _tiles(rows), -(-inputs // INT8_TILE_INPUTS)
    return workspace.digits[: tiles * k_tiles * TILE_SIDE * INT8_TILE_INPUTS].reshape(
        tiles, k_tiles, TILE_SIDE, INT8_TILE_INPUTS
    )


@compiled(forceinline=True)
def _totals(workspace: Int4Workspace, rows: int, inputs: int) -> Floats:
    return workspace.totals[: rows * _group_count(inputs)].reshape(rows, _group_count(inputs))


@compiled()
def _group_count(inputs: int) -> int:
    """Returns the groups of `inputs` inputs; the last one may be padded."""
    return -(-inputs // INT4_GROUP)
