"""Products by int8 weights, in AMX tiles. Knows arrays alone.

Rows are split into three int8 digits (`digits.py`), so all sums are exact integers, and a row's outputs do not depend
on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import SIDE, TILES, open_tiles
from stitch_server.cpu.buffers import cache_aligned
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.amx_int8 import PANELS_OF_FEW, multiply_int8_tiles
from stitch_server.cpu.matmul.digits import DEPTH, DIGITS, Digits, Int8Quads, Int32s, split_into_digits
from stitch_server.cpu.matmul.matrix import Matrix
from stitch_server.cpu.scalars import Floats

# Digits that fit into the L2 cache beside weights.
ROOM_FOR_DIGITS = 2**20
# Rows whose lines of digits fill pairs of tiles.
ROWS_OF_PAIRS = TILES * SIDE


class Int8Workspace(NamedTuple):
    """One thread's buffers."""

    # Of all rows; reshaped for each number of inputs.
    digits: Digits
    # [rows]
    scales: Floats
    # [lines of digits in whole tiles, outputs of the panels that are multiplied at the same time]
    sums: Int32s
    # How many threads share the tasks.
    threads: int


@compiled()
def int8_workspace(rows: int, inputs: int, threads: int) -> Int8Workspace:
    """For so many rows of up to so many inputs."""
    tiles = _tiles(rows)
    panels = PANELS_OF_FEW if tiles == 1 else TILES
    open_tiles()
    return Int8Workspace(
        cache_aligned(tiles * SIDE * -(-inputs // DEPTH) * DEPTH).view(np.int8),
        np.empty(rows, np.float32),
        cache_aligned(4 * tiles * SIDE * panels * SIDE).view(np.int32).reshape(tiles * SIDE, panels * SIDE),
        threads,
    )


@compiled()
def prepare_int8(x: Floats, workspace: Int8Workspace) -> None:
    """As `dispatch.prepare`."""
    split_into_digits(x, _digits(workspace, len(x), x.shape[1]), workspace.scales)


@compiled(forceinline=True)
def multiply_by_int8(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Int8Workspace,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `dispatch.multiply`."""
    at_once = max(1, ROOM_FOR_DIGITS // (DIGITS * x.shape[1] * ROWS_OF_PAIRS)) * ROWS_OF_PAIRS
    width = workspace.sums.shape[1]
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            later = output + width if output + width < end else first + workspace.threads * (end - first)
            _sum(x, top, rows, matrix.weight, output, later, workspace)
            count = min(width, end - output)
            _put(workspace, top, rows, matrix, output, count, result, place + output - first, added)


@compiled(forceinline=True)
def _sum(x: Floats, top: int, rows: int, weight: Int8Quads, output: int, later: int, workspace: Int8Workspace) -> None:
    """Integer sums of the digits of `rows` rows by the panels from `output` on; `top` begins a pair of tiles.

    The panels from output `later` on are prefetched meanwhile.
    """
    digits, first = _digits(workspace, len(x), x.shape[1]), DIGITS * top // SIDE
    at_once = min(len(digits), TILES)
    tiles = -(-DIGITS * rows // (SIDE * at_once)) * at_once
    # Lines of each tile to prefetch that one step takes.
    share = -(-SIDE * at_once // tiles)
    for tile in range(0, tiles, at_once):
        sums, line = workspace.sums[tile * SIDE :], tile // at_once * share
        prefetched = max(0, min(share, SIDE - line))
        multiply_int8_tiles(
            digits, first + tile, at_once, weight, output // SIDE, sums, later // SIDE, line, prefetched
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
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Joins digits, scales, adds the bias, and writes or adds to `result`."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target, scale = result[top + row, place : place + count], workspace.scales[top + row]
        low, middle, high = (
            workspace.sums[DIGITS * row],
            workspace.sums[DIGITS * row + 1],
            workspace.sums[DIGITS * row + 2],
        )
        for number in range(count):
            whole = np.float32(low[number]) + np.float32(256) * np.float32(middle[number])
            whole += np.float32(65536) * np.float32(high[number])
            product = whole * (scale * scales[number]) + bias[number]
            target[number] = target[number] + product if added else product


@compiled()
def _tiles(rows: int) -> int:
    """Tiles of so many rows' digits: one, or a whole number of pairs."""
    tiles = -(-DIGITS * rows // SIDE)
    return tiles if tiles <= 1 else -(-tiles // TILES) * TILES


@compiled(forceinline=True)
def _digits(workspace: Int8Workspace, rows: int, inputs: int) -> Digits:
    """The buffer, shaped for such rows."""
    tiles, deep = _tiles(rows), -(-inputs // DEPTH)
    return workspace.digits[: tiles * deep * SIDE * DEPTH].reshape(tiles, deep, SIDE, DEPTH)
