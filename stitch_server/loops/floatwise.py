"""Products of rows by a matrix of numbers, in vectors or in tiles. Knows arrays alone.

A row has the same outputs, to the last bit, in any company in either, but tiles give others than vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.amx import SIDE, close_tiles, open_tiles
from stitch_server.loops.compiling import compiled
from stitch_server.loops.matrix import Matrix
from stitch_server.loops.numbers import Floats, Numbers
from stitch_server.loops.panels import (
    FEW_ROWS,
    LANES,
    MOST_ROWS,
    PANELS,
    PANELS_OF_FEW,
    add_products,
    add_products_of_few,
)
from stitch_server.loops.tiled import ROOM_FOR_ROWS, WIDTH, Split, lines, split, split_for, sum_in_tiles

# Inputs for which two panels have room in the first cache.
INPUTS_AT_ONCE = 192
# Numbers of rows that have room in the second one beside them, and as many rows as are worth it.
ROOM_FOR_VECTORS = 2**17
ROWS_AT_ONCE = 20 * MOST_ROWS


class FloatBench(NamedTuple):
    """Room for one thread's products."""

    # [rows, outputs]
    sums: Floats
    split: Split
    # How many share the tasks, so that this one's next is likely to begin so many tasks further on.
    threads: int


@compiled()
def float_bench(rows: int, inputs: int, in_tiles: bool, threads: int) -> FloatBench:
    """For so many rows of up to so many inputs."""
    count, width = min(ROWS_AT_ONCE, rows), PANELS * LANES
    if in_tiles:
        open_tiles()
        count, width = -(-rows // SIDE) * SIDE, WIDTH
    elif rows <= FEW_ROWS:
        count, width = FEW_ROWS, PANELS_OF_FEW * LANES
    sums = lines(4 * count * width).view(np.float32).reshape(count, width)
    return FloatBench(sums, split_for(rows, inputs, in_tiles), threads)


@compiled()
def leave_floats(bench: FloatBench) -> None:
    """Behind a thread's last product."""
    if bench.split.rows.size > 0:
        close_tiles()


@compiled()
def split_floats(x: Floats, bench: FloatBench) -> None:
    """Has to be called before products are taken, and again when `x` has changed."""
    if bench.split.rows.size > 0:
        split(x, bench.split)


@compiled(forceinline=True)
def multiply_by_floats(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: FloatBench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """As `products.multiply` does."""
    width, at_once = bench.sums.shape[1], rows_at_once(len(x), x.shape[1], bench)
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            later = output + width if output + width < end else first + bench.threads * (end - first)
            sum_strip(x, top, rows, matrix.weight, output // LANES, later // LANES, bench)
            count = min(width, end - output)
            put_strip(bench.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled(forceinline=True)
def sum_strip(x: Floats, top: int, rows: int, weight: Numbers, panel: int, ahead: int, bench: FloatBench) -> None:
    """Sums of so many rows from `top` on for as many panels as the bench has room for; these may have more inputs.

    In tiles weights of panels from `ahead` on come to the second cache meanwhile, if there are any.
    """
    if bench.split.rows.size > 0:
        sum_in_tiles(x, top, rows, weight, panel, ahead, bench.split, bench.sums)
    elif len(x) <= FEW_ROWS:
        add_products_of_few(weight, panel, x, 0, rows, 0, x.shape[1], bench.sums)
    else:
        _sum_in_vectors(x, top, rows, weight, panel, bench.sums)


@compiled()
def rows_at_once(rows: int, inputs: int, bench: FloatBench) -> int:
    """As many as have room in a cache, and in about equal parts."""
    unit, room = (SIDE, ROOM_FOR_ROWS) if bench.split.rows.size > 0 else (MOST_ROWS, ROOM_FOR_VECTORS)
    most = min(len(bench.sums), max(1, room // (unit * inputs)) * unit)
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // (blocks * unit))) * unit


@compiled()
def _sum_in_vectors(x: Floats, top: int, rows: int, weight: Numbers, panel: int, sums: Floats) -> None:
    inputs, groups = x.shape[1], -(-rows // MOST_ROWS)
    # What is read once needs no room in a cache.
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
    """Sums of the outputs from `output` on to where they belong."""
    scales, bias = matrix.scales[output : output + count], matrix.bias[output : output + count]
    for row in range(rows):
        target = result[top + row, place : place + count]
        if added:
            for number in range(count):
                target[number] += sums[row, number] * scales[number] + bias[number]
        else:
            for number in range(count):
                target[number] = sums[row, number] * scales[number] + bias[number]
