"""Matmuls by int8 weights, in AMX tiles: a row's inputs are split into three int8 digits, and nothing else is rounded.

Scaled by its row's largest number, an input becomes an integer of 24 bits: three digits to the base 256, from -128 to
127. The micro-kernel multiplies them by int8 weights and accumulates in int32, exactly and in any order, so a row's
outputs do not depend on the other rows. Each digit of a row is a line of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range, for_range_slice
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import has_amx_instructions
from stitch_server.cpu.matmul.panels import Matrix
from stitch_server.cpu.scalars import Floats
from stitch_server.cpu.simd import (
    ACCUMULATORS,
    BLOCK_TILES,
    INT8,
    INT32,
    INT64,
    REGISTERS,
    TILE_BYTES,
    TILE_ROW_BYTES,
    TILE_SIDE,
    Intrinsic,
    broadcast,
    byte_offset,
    cache_aligned,
    configure_tiles,
    declare_function,
    float_vector,
    instruct,
    load_as_float32,
    prefetch,
    row_of,
    switch_cases,
    unpack_arrays,
)

Digits = NDArray[np.int8]
# int8 weights of four neighbouring inputs in one word, the first one lowest.
Int8Quads = NDArray[np.int32]
Int32s = NDArray[np.int32]

# Digits of an input.
DIGITS = 3
# Inputs of a tile: four for each of its rows.
INT8_TILE_INPUTS = 4 * TILE_SIDE
# With more inputs a sum might overflow int32.
MAX_INT8_INPUTS = 2**31 // 2**14
# The integer of a row's largest number; it leaves room for rounding.
_MAX_INTEGER = np.float32(127 * 2**16)
# Rows whose largest number is smaller count as zero.
_MIN_MAGNITUDE = np.float32(1e-30)

_WHOLES, _BYTES = ir.VectorType(INT32, TILE_SIDE), ir.VectorType(INT8, TILE_SIDE)


@compiled()
def split_into_digits(x: Floats, digits: Digits, scales: Floats) -> None:
    """Splits `[rows, inputs]` into lines of `[tiles of lines, tiles of inputs, TILE_SIDE, INT8_TILE_INPUTS]`.

    A row has DIGITS lines, lowest digits first. It is its integers times its scale, which is NaN where the row has a
    non-finite number.
    """
    inputs = x.shape[1]
    full_tiles = inputs // INT8_TILE_INPUTS
    padded = np.zeros((1, INT8_TILE_INPUTS), np.float32)
    for row in range(len(x)):
        for column in range(full_tiles * INT8_TILE_INPUTS, inputs):
            padded[0, column - full_tiles * INT8_TILE_INPUTS] = x[row, column]
        # Without their signs, floats are ordered as their bits are; infinities and NaN come last.
        bits = max(_largest(x, row, full_tiles * INT8_TILE_INPUTS), _largest(padded, 0, INT8_TILE_INPUTS))
        size = np.int32(bits).view(np.float32)
        factor = _MAX_INTEGER / size if _MIN_MAGNITUDE < size < np.inf else np.float32(0)
        scales[row] = size / _MAX_INTEGER if size < np.inf else np.float32(np.nan)
        for k_tile in range(full_tiles):
            _split(x, row, k_tile * INT8_TILE_INPUTS, factor, digits, k_tile, DIGITS * row)
        if full_tiles < digits.shape[1]:
            _split(padded, 0, 0, factor, digits, full_tiles, DIGITS * row)


def _typed_largest(typing: Any, x: Any, row: Any, end: Any) -> Intrinsic:
    """The bits of max |x[row, :end]|; `end` is a multiple of TILE_SIDE."""
    return types.int32(x, types.int64, types.int64), _generate_largest


def _typed_split(
    typing: Any, x: Any, row: Any, column: Any, factor: Any, digits: Any, k_tile: Any, line: Any
) -> Intrinsic:
    """Writes digits of factor · x[row, column : column + INT8_TILE_INPUTS] to lines from `line` on of `digits`."""
    int64 = types.int64
    return types.void(x, int64, int64, types.float32, digits, int64, int64), _generate_split


_largest: Callable[[Floats, int, int], int] = cast(Any, intrinsic(_typed_largest))
_split: Callable[[Floats, int, int, np.float32, Digits, int, int], None] = cast(Any, intrinsic(_typed_split))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    x, row, end = unpack_arrays(context, builder, signature, arguments)
    source = row_of(builder, x, row)
    found = alloca_once_value(builder, _WHOLES([0] * TILE_SIDE))  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), end, INT64(TILE_SIDE)) as (column, _):
        address = builder.bitcast(builder.gep(source, [column]), _WHOLES.as_pointer())
        bits = builder.and_(builder.load(address, align=4), _WHOLES([0x7FFFFFFF] * TILE_SIDE))
        largest = builder.load(found)
        builder.store(builder.select(builder.icmp_signed(">", bits, largest), bits, largest), found)
    kind = ir.FunctionType(INT32, [_WHOLES])
    return builder.call(
        declare_function(builder, kind, f"llvm.vector.reduce.smax.v{TILE_SIDE}i32"), [builder.load(found)]
    )


def _generate_split(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    x, row, column, factor, digits, k_tile, line = unpack_arrays(context, builder, signature, arguments)
    source = builder.gep(row_of(builder, x, row), [column])
    factors = broadcast(builder, factor, TILE_SIDE)
    targets = []
    for digit in range(DIGITS):
        number = builder.add(line, INT64(digit))
        tile, within = builder.udiv(number, INT64(TILE_SIDE)), builder.urem(number, INT64(TILE_SIDE))
        byte_offset = builder.add(builder.mul(tile, builder.extract_value(digits.shape, 1)), k_tile)
        byte_offset = builder.add(builder.mul(byte_offset, INT64(TILE_SIDE)), within)
        targets.append(builder.gep(digits.data, [builder.mul(byte_offset, INT64(INT8_TILE_INPUTS))]))
    nearest = declare_function(
        builder, ir.FunctionType(float_vector(TILE_SIDE), [float_vector(TILE_SIDE)]), f"llvm.rint.v{TILE_SIDE}f32"
    )
    for begin in range(0, INT8_TILE_INPUTS, TILE_SIDE):
        values = builder.fmul(load_as_float32(builder, builder.gep(source, [INT64(begin)]), TILE_SIDE), factors)
        left = builder.fptosi(builder.call(nearest, [values]), _WHOLES)
        for target in targets:
            address = builder.bitcast(builder.gep(target, [INT64(begin)]), _BYTES.as_pointer())
            builder.store(builder.trunc(left, _BYTES), address, align=1)
            # Rounds, since the digit may be negative.
            left = builder.ashr(builder.add(left, _WHOLES([128] * TILE_SIDE)), _WHOLES([8] * TILE_SIDE))
    return context.get_dummy_value()


# Panels of a call where there is a single tile of lines.
FEW_ROWS_PANELS = ACCUMULATORS


def _typed_matmul_int8_tiles(
    typing: Any,
    rows: Any,
    tile: Any,
    tiles: Any,
    weight: Any,
    panel: Any,
    sums: Any,
    next_panel: Any,
    line: Any,
    prefetched: Any,
) -> Intrinsic:
    """sums[r, o] = Σ rows[tile: r, k] · weight[panel: o, k], of int8, over all tiles of inputs.

    Multiplies one tile of rows by FEW_ROWS_PANELS panels, or BLOCK_TILES tiles by as many panels; where there are fewer
    panels, the last one is repeated. `rows` is `[tiles of rows, tiles of inputs, TILE_SIDE, 4 * TILE_SIDE]`, `weight`
    `[panels, TILE_SIDE * tiles of inputs, TILE_SIDE]`, `sums` `[any, panels * TILE_SIDE]`, all contiguous. Prefetches
    as many panels from `next_panel` on: of each of their tiles `prefetched` lines from `line` on.
    """
    int64 = types.int64
    return types.void(rows, int64, int64, weight, int64, sums, int64, int64, int64), _generate_matmul_int8_tiles


_MatmulInt8Tiles = Callable[[Digits, int, int, Int8Quads, int, Int32s, int, int, int], None]
matmul_int8_tiles: _MatmulInt8Tiles = cast(Any, intrinsic(_typed_matmul_int8_tiles))


def _generate_matmul_int8_tiles(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    if not has_amx_instructions():
        return context.get_dummy_value()
    rows, tile, tiles, weight, panel, sums, next_panel, first, prefetched = unpack_arrays(
        context, builder, signature, arguments
    )
    k_tiles = builder.extract_value(rows.shape, 1)
    tile_row_stride, stride = builder.mul(k_tiles, INT64(TILE_BYTES)), builder.extract_value(weight.strides, 0)
    count = builder.extract_value(weight.shape, 0)
    last = builder.sub(count, INT64(1))
    for number in switch_cases(builder, tiles, BLOCK_TILES):
        panels = ACCUMULATORS // number
        begin = builder.mul(tile, tile_row_stride)
        lines = [
            byte_offset(builder, rows.data, builder.add(begin, builder.mul(tile_row_stride, INT64(n))))
            for n in range(number)
        ]
        panel_addresses = [_panel(builder, weight, builder.add(panel, INT64(n)), last, stride) for n in range(panels)]
        prefetch_addresses = [
            _panel(builder, weight, builder.add(next_panel, INT64(n)), last, stride) for n in range(panels)
        ]
        _emit_k_loop(builder, lines, panel_addresses, k_tiles, prefetch_addresses, first, prefetched)
        for register in range(ACCUMULATORS):
            line, column = divmod(register, panels)
            target = byte_offset(builder, sums.data, INT64((line * TILE_SIDE * panels + column) * TILE_ROW_BYTES))
            instruct(builder, "tilestored64", INT8(register), target, INT64(panels * TILE_ROW_BYTES))
    return context.get_dummy_value()


def _panel(builder: ir.IRBuilder, weight: Any, number: ir.Value, last: ir.Value, stride: ir.Value) -> ir.Value:
    """Returns the address of a panel, or of the last one."""
    number = builder.select(builder.icmp_signed("<", number, last), number, last)
    return byte_offset(builder, weight.data, builder.mul(number, stride))


def _emit_k_loop(
    builder: ir.IRBuilder,
    lines: Sequence[ir.Value],
    panels: Sequence[ir.Value],
    count: ir.Value,
    prefetch_addresses: Sequence[ir.Value],
    first: ir.Value,
    prefetched: ir.Value,
) -> None:
    """Emits the loop over tiles of inputs; accumulators stay in registers."""
    for register in range(ACCUMULATORS):
        instruct(builder, "tilezero", INT8(register))
    with for_range(builder, count) as step:
        offset = builder.mul(step.index, INT64(TILE_BYTES))
        for number, address in enumerate(lines):
            instruct(
                builder,
                "tileloadd64",
                INT8(ACCUMULATORS + number),
                builder.gep(address, [offset]),
                INT64(TILE_ROW_BYTES),
            )
        free = REGISTERS - ACCUMULATORS - len(lines)
        for number, address in enumerate(panels):
            register = ACCUMULATORS + len(lines) + number % free
            instruct(builder, "tileloadd64", INT8(register), builder.gep(address, [offset]), INT64(TILE_ROW_BYTES))
            for row in range(len(lines)):
                instruct(builder, "tdpbssd", *map(INT8, (len(panels) * row + number, ACCUMULATORS + row, register)))
        with for_range(builder, prefetched) as line:
            line_offset = builder.add(offset, builder.mul(builder.add(first, line.index), INT64(TILE_ROW_BYTES)))
            for address in prefetch_addresses:
                prefetch(builder, builder.gep(address, [line_offset]))


# Digits that fit into the L2 cache beside weights.
L2_DIGITS = 2**20
# Rows whose lines of digits fill pairs of tiles.
TILE_PAIR_ROWS = BLOCK_TILES * TILE_SIDE


class Int8Workspace(NamedTuple):
    """One thread's buffers."""

    # The digits of all rows; reshaped for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # [lines of digits in whole tiles, outputs of the panels that are multiplied at the same time]
    sums: Int32s
    # The threads that share the tasks.
    threads: int


@compiled()
def new_int8_workspace(rows: int, inputs: int, threads: int) -> Int8Workspace:
    """Allocates buffers for `rows` rows of up to `inputs` inputs."""
    tiles = _tiles(rows)
    panels = FEW_ROWS_PANELS if tiles == 1 else BLOCK_TILES
    configure_tiles()
    return Int8Workspace(
        cache_aligned(tiles * TILE_SIDE * -(-inputs // INT8_TILE_INPUTS) * INT8_TILE_INPUTS).view(np.int8),
        np.empty(rows, np.float32),
        cache_aligned(4 * tiles * TILE_SIDE * panels * TILE_SIDE)
        .view(np.int32)
        .reshape(tiles * TILE_SIDE, panels * TILE_SIDE),
        threads,
    )


@compiled()
def prepare_int8(x: Floats, workspace: Int8Workspace) -> None:
    """See `dispatch.prepare_input`."""
    split_into_digits(x, _digits(workspace, len(x), x.shape[1]), workspace.scales)


@compiled(forceinline=True)
def matmul_int8(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int8Workspace,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """See `dispatch.matmul`."""
    at_once = max(1, L2_DIGITS // (DIGITS * x.shape[1] * TILE_PAIR_ROWS)) * TILE_PAIR_ROWS
    width = workspace.sums.shape[1]
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            next_output = output + width if output + width < end else first + workspace.threads * (end - first)
            _sum(x, top, rows, matrix.weight, output, next_output, workspace)
            count = min(width, end - output)
            _put(workspace, top, rows, matrix, output, count, result, column + output - first, accumulate)


@compiled(forceinline=True)
def _sum(
    x: Floats, top: int, rows: int, weight: Int8Quads, output: int, next_output: int, workspace: Int8Workspace
) -> None:
    """Multiplies the digits of `rows` rows by the panels from `output` on; `top` begins a pair of tiles.

    The panels from output `next_output` on are prefetched meanwhile.
    """
    digits, first = _digits(workspace, len(x), x.shape[1]), DIGITS * top // TILE_SIDE
    at_once = min(len(digits), BLOCK_TILES)
    tiles = -(-DIGITS * rows // (TILE_SIDE * at_once)) * at_once
    # Lines of each tile that one step prefetches.
    share = -(-TILE_SIDE * at_once // tiles)
    for tile in range(0, tiles, at_once):
        sums, line = workspace.sums[tile * TILE_SIDE :], tile // at_once * share
        prefetched = max(0, min(share, TILE_SIDE - line))
        matmul_int8_tiles(
            digits, first + tile, at_once, weight, output // TILE_SIDE, sums, next_output // TILE_SIDE, line, prefetched
        )


@compiled(forceinline=True)
def _put(
    workspace: Int8Workspace,
    top: int,
    rows: int,
    matrix: Matrix,
    output: int,
    count: int,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """Joins digits, scales, adds the bias, and writes or adds to `result`."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target, scale = result[top + row, column : column + count], workspace.scales[top + row]
        low, middle, high = (
            workspace.sums[DIGITS * row],
            workspace.sums[DIGITS * row + 1],
            workspace.sums[DIGITS * row + 2],
        )
        for number in range(count):
            integer = np.float32(low[number]) + np.float32(256) * np.float32(middle[number])
            integer += np.float32(65536) * np.float32(high[number])
            product = integer * (scale * scales[number]) + bias[number]
            target[number] = target[number] + product if accumulate else product


@compiled()
def _tiles(rows: int) -> int:
    """Returns the tiles of the digits of `rows` rows: one, or a whole number of pairs."""
    tiles = -(-DIGITS * rows // TILE_SIDE)
    return tiles if tiles <= 1 else -(-tiles // BLOCK_TILES) * BLOCK_TILES


@compiled(forceinline=True)
def _digits(workspace: Int8Workspace, rows: int, inputs: int) -> Digits:
    """Returns the buffer, shaped for these rows."""
    tiles, k_tiles = _tiles(rows), -(-inputs // INT8_TILE_INPUTS)
    return workspace.digits[: tiles * k_tiles * TILE_SIDE * INT8_TILE_INPUTS].reshape(
        tiles, k_tiles, TILE_SIDE, INT8_TILE_INPUTS
    )
