"""Products of rows by a matrix, in tasks that threads share. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from stitch_server.loops.amx import SIDE, close_tiles, open_tiles
from stitch_server.loops.bytewise import ByteBench, byte_bench, multiply_by_bytes, split_bytes
from stitch_server.loops.compiling import compiled
from stitch_server.loops.digits import Quads
from stitch_server.loops.matrix import REPLACE, Matrix
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
from stitch_server.loops.tiled import ROOM_FOR_ROWS, WIDTH, Split, lines, split, split_for, sum_in_tiles

# Weights that a task reads: enough to take longer than counting it, few enough for threads to end together.
TASK_WEIGHTS = 2**15
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


Bench = FloatBench | ByteBench


def bench_for(rows: int, inputs: int, weight: Numbers | Quads, in_tiles: bool, threads: int) -> Bench:
    """For so many rows of up to so many inputs, by such weights; `in_tiles` where the processor has these.

    Whoever asks for it has to `leave` it. Only compiled, as is all that is for several kinds of weights.
    """
    raise NotImplementedError


def leave(bench: Bench) -> None:
    """Behind a thread's last product."""
    raise NotImplementedError


def ready(x: Floats, bench: Bench) -> None:
    """Has to be called before `multiply` is, and again when `x` has changed."""
    raise NotImplementedError


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
    raise NotImplementedError


@overload(bench_for, strict=False)
def _bench_by_kind(rows: Any, inputs: Any, weight: Any, in_tiles: Any, threads: Any) -> Callable[..., Any]:
    if weight.dtype == types.int32:
        return lambda rows, inputs, weight, in_tiles, threads: byte_bench(rows, inputs, threads)
    return lambda rows, inputs, weight, in_tiles, threads: _bench(rows, inputs, in_tiles, threads)


@overload(leave, strict=False)
def _leave_by_kind(bench: Any) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda bench: close_tiles()
    return lambda bench: _leave(bench)


@overload(ready, strict=False)
def _ready_by_kind(x: Any, bench: Any) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda x, bench: split_bytes(x, bench)
    return lambda x, bench: _ready(x, bench)


@overload(multiply, strict=False)
def _multiply_by_kind(
    x: Any, matrix: Any, first: Any, end: Any, bench: Any, result: Any, place: Any, added: Any
) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda x, matrix, first, end, bench, result, place, added: multiply_by_bytes(
            x, matrix, first, end, bench, result, place, added
        )
    return lambda x, matrix, first, end, bench, result, place, added: _multiply(
        x, matrix, first, end, bench, result, place, added
    )


@compiled()
def _bench(rows: int, inputs: int, in_tiles: bool, threads: int) -> FloatBench:
    count, width = min(ROWS_AT_ONCE, rows), PANELS * LANES
    if in_tiles:
        open_tiles()
        count, width = -(-rows // SIDE) * SIDE, WIDTH
    elif rows <= FEW_ROWS:
        count, width = FEW_ROWS, PANELS_OF_FEW * LANES
    sums = lines(4 * count * width).view(np.float32).reshape(count, width)
    return FloatBench(sums, split_for(rows, inputs, in_tiles), threads)


@compiled()
def _leave(bench: FloatBench) -> None:
    if bench.split.rows.size > 0:
        close_tiles()


@compiled()
def _ready(x: Floats, bench: FloatBench) -> None:
    if bench.split.rows.size > 0:
        split(x, bench.split)


@compiled(forceinline=True)
def _multiply(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    bench: FloatBench,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
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
def _rows_at_once(rows: int, inputs: int, bench: FloatBench) -> int:
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


@compiled(forceinline=True)
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
    # Four bytes of quads count as one weight: a task reads about as much memory as one of float32.
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
        leave(bench)
    wait_for(counts, tasks)


@compiled()
def outputs_at_once(inputs: int) -> int:
    """How many outputs a task has: whole panels, and enough for a few rows."""
    width = PANELS_OF_FEW * LANES
    return max(1, TASK_WEIGHTS // (width * inputs)) * width
