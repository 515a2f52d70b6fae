"""Products of rows by a matrix, in tasks that threads share. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, Places
from stitch_server.loops.panels import (
    FEW_ROWS,
    LANES,
    MOST_ROWS,
    PANELS,
    PANELS_OF_FEW,
    add_products,
    add_products_of_few,
)
from stitch_server.loops.parts import SIDE
from stitch_server.loops.tasks import first_task, next_task, wait_for
from stitch_server.loops.tiled import ROOM_FOR_ROWS, WIDTH, Split, lines, split, split_for, sum_in_tiles

# Weights that a task reads: enough to take longer than counting it, few enough for threads to end together.
TASK_WEIGHTS = 2**15
# Inputs for which two panels have room in the first cache.
INPUTS_AT_ONCE = 192
# Numbers of rows that have room in the second one beside them, and as many rows as are worth it.
ROOM_FOR_VECTORS = 2**17
ROWS_AT_ONCE = 20 * MOST_ROWS

# What becomes of an old result. Not Python's own, for each of which functions would be compiled anew.
ADD, REPLACE = np.bool_(True), np.bool_(False)


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [panels, inputs, LANES]: as `panels` says.
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats


class Bench(NamedTuple):
    """Room for one thread's products."""

    # [rows, outputs]
    sums: Floats
    split: Split
    # How many share the tasks, so that this one's next is likely to begin so many tasks further on.
    threads: int


@compiled()
def bench_for(rows: int, inputs: int, weight: Numbers, in_tiles: bool, threads: int) -> Bench:
    """For so many rows of up to so many inputs, by such weights; `in_tiles` where the processor has these."""
    count, width = min(ROWS_AT_ONCE, rows), PANELS * LANES
    if in_tiles:
        count, width = -(-rows // SIDE) * SIDE, WIDTH
    elif rows <= FEW_ROWS:
        count, width = FEW_ROWS, PANELS_OF_FEW * LANES
    sums = lines(4 * count * width).view(np.float32).reshape(count, width)
    return Bench(sums, split_for(rows, inputs, weight, in_tiles), threads)


@compiled()
def ready(x: Floats, bench: Bench) -> None:
    """Has to be called before `multiply` is, and again when `x` has changed."""
    if bench.split.rows.size > 0:
        split(x, bench.split)


@compiled()
def multiply(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: Bench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Outputs [first, end) of `[rows, inputs]` to `result[:, place:]`, or added to what is there.

    The first one begins a panel; rows are `ready`. A row has the same outputs, to the last bit, in any company, but
    tiles give others than vectors.
    """
    inputs, width = matrix.weight.shape[1], bench.sums.shape[1]
    at_once = _rows_at_once(len(x), inputs, bench)
    for top in range(0, len(x), at_once):
        rows = min(at_once, len(x) - top)
        for output in range(first, end, width):
            if bench.split.rows.size > 0:
                later = output + width if output + width < end else first + bench.threads * (end - first)
                sum_in_tiles(x, top, rows, matrix.weight, output, later, bench.split, bench.sums)
            elif len(x) <= FEW_ROWS:
                add_products_of_few(matrix.weight, output // LANES, x, 0, rows, 0, inputs, bench.sums)
            else:
                _sum_in_vectors(x, top, rows, matrix.weight, output, bench.sums)
            count = min(width, end - output)
            _put(bench.sums, rows, matrix, output, count, result, top, place + output - first, added)


@compiled()
def _rows_at_once(rows: int, inputs: int, bench: Bench) -> int:
    """As many as have room in a cache, and in about equal parts."""
    unit, room = (SIDE, ROOM_FOR_ROWS) if bench.split.rows.size > 0 else (MOST_ROWS, ROOM_FOR_VECTORS)
    most = min(len(bench.sums), max(1, room // (unit * inputs)) * unit)
    blocks = max(1, -(-rows // most))
    return max(1, -(-rows // (blocks * unit))) * unit


@compiled()
def _sum_in_vectors(x: Floats, top: int, rows: int, weight: Numbers, output: int, sums: Floats) -> None:
    inputs, groups = weight.shape[1], -(-rows // MOST_ROWS)
    # What is read once needs no room in a cache.
    at_once = INPUTS_AT_ONCE if groups > 1 else inputs
    for begin in range(0, inputs, at_once):
        after = min(begin + at_once, inputs)
        for group in range(groups):
            row, later = group * rows // groups, (group + 1) * rows // groups
            add_products(weight, output // LANES, x, top + row, later - row, begin, after, sums[row:])


@compiled()
def _put(
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


@compiled()
def multiply_shared(x: Floats, matrix: Matrix, result: Floats, in_tiles: bool, threads: int, counts: Places) -> None:
    """`[rows, inputs]` to `[rows, outputs]`, by all threads that call it with the same `counts`."""
    outputs, at_once = len(matrix.bias), outputs_at_once(matrix.weight.shape[1])
    tasks = -(-outputs // at_once)
    task = first_task(counts)
    if task < tasks:
        bench = bench_for(len(x), x.shape[1], matrix.weight, in_tiles, threads)
        ready(x, bench)
        while task < tasks:
            first = task * at_once
            multiply(x, matrix, first, min(first + at_once, outputs), bench, result, first, REPLACE)
            task = next_task(counts)
    wait_for(counts, tasks)


@compiled()
def outputs_at_once(inputs: int) -> int:
    """How many outputs a task has: whole panels, and enough for a few rows."""
    width = PANELS_OF_FEW * LANES
    return max(1, TASK_WEIGHTS // (width * inputs)) * width
