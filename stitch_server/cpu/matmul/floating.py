"""Products by float32 and bfloat16 weights, in vector registers or in AMX tiles. Knows arrays alone.

Many rows are cut into blocks, and the inputs of a block into pieces, so that what is read again comes from a cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.amx import SIDE, close_tiles, open_tiles
from stitch_server.cpu.buffers import cache_aligned
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.matrix import Matrix
from stitch_server.cpu.matmul.panels import (
    FEW_ROWS,
    LANES,
    MOST_ROWS,
    PANELS,
    PANELS_OF_FEW,
    add_products,
    add_products_of_few,
)
from stitch_server.cpu.matmul.strips import (
    ROOM_FOR_ROWS,
    WIDTH,
    Split,
    split,
    split_for,
    sum_in_tiles,
)
from stitch_server.cpu.scalars import Floats, Numbers

# Inputs for which two panels fit into the L1 cache.
INPUTS_AT_ONCE = 192
# Numbers of rows that fit into the L2 cache beside them, and the most rows of a block.
ROOM_FOR_VECTORS = 2**17
ROWS_AT_ONCE = 20 * MOST_ROWS


class FloatWorkspace(NamedTuple):
    """One thread's buffers."""

    # [rows, outputs]
    sums: Floats
    split: Split
    # How many threads share the tasks: this one's next is likely to be so many tasks further on.
    threads: int


@compiled()
def float_workspace(rows: int, inputs: int, in_tiles: bool, threads: int) -> FloatWorkspace:
    """For so many rows of up to so many inputs."""
    count, width = min(ROWS_AT_ONCE, rows), PANELS * LANES
    if in_tiles:
        open_tiles()
        count, width = -(-rows // SIDE) * SIDE, WIDTH
    elif rows <= FEW_ROWS:
        count, width = FEW_ROWS, PANELS_OF_FEW * LANES
    sums = cache_aligned(4 * count * width).view(np.float32).reshape(count, width)
    return FloatWorkspace(sums, split_for(rows, inputs, in_tiles), threads)


@compiled()
def release_floats(workspace: FloatWorkspace) -> None:
    """As `dispatch.release`."""
    if workspace.split.rows.size > 0:
        close_tiles()


@compiled()
def prepare_floats(x: Floats, workspace: FloatWorkspace) -> None:
    """As `dispatch.prepare`."""
    if workspace.split.rows.size > 0:
        split(x, workspace.split)


@compiled(forceinline=True)
def multiply_by_floats(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: FloatWorkspace,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `dispatch.multiply`."""
    width, at_once = workspace.sums.shape[1], rows_at_once(len(x), x.shape[1], workspace)
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            later = output + width if output + width < end else first + workspace.threads * (end - first)
            sum_strip(x, top, rows, matrix.weight, output // LANES, later // LANES, workspace)
            count = min(width, end - output)
            put_strip(workspace.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled(forceinline=True)
def sum_strip(
    x: Floats, top: int, rows: int, weight: Numbers, panel: int, ahead: int, workspace: FloatWorkspace
) -> None:
    """Products of `rows` rows from `top` on by the panels from `panel` on, as many as the workspace has sums for.

    Panels may have more inputs than rows. In tiles the panels from `ahead` on, if any, are prefetched meanwhile.
    """
    if workspace.split.rows.size > 0:
        sum_in_tiles(x, top, rows, weight, panel, ahead, workspace.split, workspace.sums)
    elif len(x) <= FEW_ROWS:
        add_products_of_few(weight, panel, x, 0, rows, 0, x.shape[1], workspace.sums)
    else:
        _sum_in_vectors(x, top, rows, weight, panel, workspace.sums)


@compiled()
def rows_at_once(rows: int, inputs: int, workspace: FloatWorkspace) -> int:
    """How many rows a block has: as many as fit into a cache, in about equal blocks."""
    unit, room = (SIDE, ROOM_FOR_ROWS) if workspace.split.rows.size > 0 else (MOST_ROWS, ROOM_FOR_VECTORS)
    most = min(len(workspace.sums), max(1, room // (unit * inputs)) * unit)
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // (blocks * unit))) * unit


@compiled()
def _sum_in_vectors(x: Floats, top: int, rows: int, weight: Numbers, panel: int, sums: Floats) -> None:
    inputs, groups = x.shape[1], -(-rows // MOST_ROWS)
    # A single group of rows reads everything once, so nothing need stay in a cache.
    at_once = INPUTS_AT_ONCE if groups > 1 else inputs
    for begin in range(0, inputs, at_once):
        after = min(begin + at_once, inputs)
        for group in range(groups):
            row, later = group * rows // groups, (group + 1) * rows // groups
            add_products(weight, panel, x, top + row, later - row, begin, after, sums[row:])


@compiled(forceinline=True)
def put_strip(
    sums: Floats,
    rows: int,
    matrix: Matrix,
    output: int,
    count: int,
    result: Floats,
    top: int,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Scales sums, adds the bias, and writes or adds them to `result`."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target = result[top + row, place : place + count]
        if added:
            for number in range(count):
                target[number] += sums[row, number] * scales[number] + bias[number]
        else:
            for number in range(count):
                target[number] = sums[row, number] * scales[number] + bias[number]
