"""Products by int4 weights. Knows arrays alone.

A few rows are split into int8 digits, and multiplied by VNNI without dequantizing a weight (`vnni_int4.py`). Many rows
share weights that are dequantized a strip at a time, with the same results, to the last bit, as by float32 weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import SIDE
from stitch_server.cpu.buffers import cache_aligned
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.instructions import Instructions
from stitch_server.cpu.matmul.digits import DEPTH, DIGITS, Digits, split_into_digits
from stitch_server.cpu.matmul.floating import (
    FloatWorkspace,
    float_workspace,
    prepare_floats,
    put_strip,
    release_floats,
    rows_at_once,
    sum_strip,
)
from stitch_server.cpu.matmul.int4_groups import dequantize
from stitch_server.cpu.matmul.int4_layout import GROUP
from stitch_server.cpu.matmul.matrix import Matrix
from stitch_server.cpu.matmul.panels import LANES
from stitch_server.cpu.matmul.vnni_int4 import (
    MOST_ROWS,
    PANELS,
    PANELS_OF_ONE,
    add_int4_products,
    add_int4_products_of_one,
)
from stitch_server.cpu.scalars import Floats


class Int4Workspace(NamedTuple):
    """One thread's buffers."""

    floats: FloatWorkspace
    # Weights of a strip, where they are dequantized.
    wide: Floats
    # Of all rows, where VNNI multiplies; reshaped for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # [rows, groups]: sums of each row's digits over a group of inputs.
    totals: Floats
    # [rows, outputs] of one call.
    sums: Floats


@compiled()
def int4_workspace(rows: int, inputs: int, by: Instructions, threads: int) -> Int4Workspace:
    """For so many rows of up to so many inputs."""
    floats, split = float_workspace(rows, inputs, by.tiles, threads), rows if by.dots and not by.tiles else 0
    wide = floats.sums.shape[1] * _groups(inputs) * GROUP if split == 0 else 0
    some, width = (1, PANELS_OF_ONE * LANES) if rows == 1 else (MOST_ROWS, PANELS * LANES)
    return Int4Workspace(
        floats,
        cache_aligned(4 * wide).view(np.float32),
        cache_aligned(_tiles(split) * -(-inputs // DEPTH) * SIDE * DEPTH).view(np.int8),
        np.empty(split, np.float32),
        np.empty(split * _groups(inputs), np.float32),
        cache_aligned(4 * some * width).view(np.float32).reshape(some, width),
    )


@compiled()
def release_int4(workspace: Int4Workspace) -> None:
    """As `dispatch.release`."""
    release_floats(workspace.floats)


@compiled()
def prepare_int4(x: Floats, workspace: Int4Workspace) -> None:
    """As `dispatch.prepare`."""
    if workspace.digits.size == 0:
        prepare_floats(x, workspace.floats)
        return
    rows, inputs = x.shape
    digits, totals = _digits(workspace, rows, inputs), _totals(workspace, rows, inputs)
    split_into_digits(x, digits, workspace.scales)
    for row in range(rows):
        for group in range(_groups(inputs)):
            totals[row, group] = _total(digits, DIGITS * row, group)


@compiled(forceinline=True)
def multiply_by_int4(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int4Workspace,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `dispatch.multiply`."""
    if workspace.digits.size == 0:
        _multiply_dequantized(x, matrix, first, end, workspace, result, place, added)
        return
    digits, totals = _digits(workspace, len(x), x.shape[1]), _totals(workspace, len(x), x.shape[1])
    at_once, width = workspace.sums.shape
    for output in range(first, end, width):
        later = output + width if output + width < end else first + workspace.floats.threads * (end - first)
        panel, ahead, count = output // LANES, later // LANES, min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            if at_once == 1:
                add_int4_products_of_one(matrix.weight, panel, ahead, digits, totals, top, rows, workspace.sums)
            else:
                add_int4_products(matrix.weight, panel, ahead, digits, totals, top, rows, workspace.sums)
            for row in range(rows):
                for number in range(width):
                    workspace.sums[row, number] *= workspace.scales[top + row]
            put_strip(workspace.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled()
def _multiply_dequantized(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int4Workspace,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    floats = workspace.floats
    width, at_once = floats.sums.shape[1], rows_at_once(len(x), x.shape[1], floats)
    panels, filled = width // LANES, _groups(x.shape[1]) * GROUP
    wide = workspace.wide[: width * filled].reshape(panels, filled, LANES)
    for output in range(first, end, width):
        later = output + width if output + width < end else first + floats.threads * (end - first)
        dequantize(matrix.weight, output // LANES, later // LANES, wide)
        count = min(width, end - output)
        for top in range(0, len(x), at_once):
            rows = min(at_once, len(x) - top)
            sum_strip(x, top, rows, wide, 0, panels, floats)
            put_strip(floats.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled()
def _total(digits: Digits, line: int, group: int) -> np.int32:
    """The sum of a group's numbers, whose lowest digits are in this line."""
    begin, total = group * GROUP % DEPTH, np.int32(0)
    for digit in range(DIGITS - 1, -1, -1):
        tile, within = divmod(line + digit, SIDE)
        some = np.int32(0)
        for one in digits[tile, group * GROUP // DEPTH, within, begin : begin + GROUP]:
            some += np.int32(one)
        total = np.int32(256) * total + some
    return total


@compiled()
def _tiles(rows: int) -> int:
    """Tiles of so many rows' digits."""
    return -(-DIGITS * rows // SIDE)


@compiled(forceinline=True)
def _digits(workspace: Int4Workspace, rows: int, inputs: int) -> Digits:
    """The buffer, shaped for such rows."""
    tiles, deep = _tiles(rows), -(-inputs // DEPTH)
    return workspace.digits[: tiles * deep * SIDE * DEPTH].reshape(tiles, deep, SIDE, DEPTH)


@compiled(forceinline=True)
def _totals(workspace: Int4Workspace, rows: int, inputs: int) -> Floats:
    return workspace.totals[: rows * _groups(inputs)].reshape(rows, _groups(inputs))


@compiled()
def _groups(inputs: int) -> int:
    """Groups of so many inputs; the last one may be padded."""
    return -(-inputs // GROUP)
