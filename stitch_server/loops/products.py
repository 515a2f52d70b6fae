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
from stitch_server.loops.tasks import first_task, next_task, wait_for

# Weights that a task reads: enough to take longer than counting it, few enough for threads to end together.
TASK_WEIGHTS = 2**15
# Inputs for which two panels have room in the first cache.
INPUTS_AT_ONCE = 192
# Numbers of rows that have room in the second one, and as many rows as are worth it.
ROOM_FOR_ROWS = 2**17
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


@compiled()
def room_for(rows: int) -> Floats:
    """Sums of one thread's products."""
    few = rows <= FEW_ROWS
    shape = (FEW_ROWS, PANELS_OF_FEW * LANES) if few else (min(ROWS_AT_ONCE, rows), PANELS * LANES)
    return np.empty(shape, np.float32)


@compiled()
def multiply(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    sums: Floats,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Outputs [first, end) of `[rows, inputs]` to `result[:, place:]`, or added to what is there.

    The first one begins a panel; `sums` is room for so many rows. A row has the same outputs, to the last bit, in any
    company.
    """
    inputs, width = matrix.weight.shape[1], sums.shape[1]
    if len(x) <= FEW_ROWS:
        for output in range(first, end, width):
            add_products_of_few(matrix.weight, output // LANES, x, 0, len(x), 0, inputs, sums)
            _put(sums, len(x), matrix, output, min(width, end - output), result, 0, place + output - first, added)
        return
    at_once = min(len(sums), max(1, ROOM_FOR_ROWS // (MOST_ROWS * inputs)) * MOST_ROWS)
    blocks = -(-len(x) // at_once)
    for block in range(blocks):
        top = block * len(x) // blocks
        rows = (block + 1) * len(x) // blocks - top
        groups = -(-rows // MOST_ROWS)
        # What is read once needs no room in a cache.
        inputs_at_once = INPUTS_AT_ONCE if groups > 1 else inputs
        for output in range(first, end, width):
            for begin in range(0, inputs, inputs_at_once):
                after = min(begin + inputs_at_once, inputs)
                for group in range(groups):
                    row, later = group * rows // groups, (group + 1) * rows // groups
                    add_products(matrix.weight, output // LANES, x, top + row, later - row, begin, after, sums[row:])
            _put(sums, rows, matrix, output, min(width, end - output), result, top, place + output - first, added)


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
def multiply_shared(x: Floats, matrix: Matrix, result: Floats, counts: Places) -> None:
    """`[rows, inputs]` to `[rows, outputs]`, by all threads that call it with the same `counts`."""
    outputs, at_once = len(matrix.bias), outputs_at_once(matrix.weight.shape[1])
    sums = room_for(len(x))
    tasks = -(-outputs // at_once)
    task = first_task(counts)
    while task < tasks:
        first = task * at_once
        multiply(x, matrix, first, min(first + at_once, outputs), sums, result, first, REPLACE)
        task = next_task(counts)
    wait_for(counts, tasks)


@compiled()
def outputs_at_once(inputs: int) -> int:
    """How many outputs a task has: whole panels, and enough for a few rows."""
    width = PANELS_OF_FEW * LANES
    return max(1, TASK_WEIGHTS // (width * inputs)) * width
