"""Products of rows by a matrix, in tasks that threads share. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from stitch_server.loops.amx import close_tiles
from stitch_server.loops.bytewise import ByteBench, byte_bench, multiply_by_bytes, split_bytes
from stitch_server.loops.compiling import compiled
from stitch_server.loops.floatwise import FloatBench, float_bench, leave_floats, multiply_by_floats, split_floats
from stitch_server.loops.fourwise import FourBench, four_bench, leave_fours, multiply_by_fours, split_fours
from stitch_server.loops.instructions import Instructions
from stitch_server.loops.matrix import REPLACE, Matrix
from stitch_server.loops.numbers import Floats, Numbers, Places
from stitch_server.loops.panels import LANES, PANELS_OF_FEW
from stitch_server.loops.tasks import first_task, next_task, wait_for

# Weights that a task reads: enough to take longer than counting it, few enough for threads to end together.
TASK_WEIGHTS = 2**15

Bench = FloatBench | ByteBench | FourBench


def bench_for(rows: int, inputs: int, weight: Numbers, by: Instructions, threads: int) -> Bench:
    """For so many rows of up to so many inputs, by such weights.

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
def _bench_by_kind(rows: Any, inputs: Any, weight: Any, by: Any, threads: Any) -> Callable[..., Any]:
    if weight.dtype == types.int32:
        return lambda rows, inputs, weight, by, threads: byte_bench(rows, inputs, threads)
    if weight.dtype == types.uint32:
        return lambda rows, inputs, weight, by, threads: four_bench(rows, inputs, by, threads)
    return lambda rows, inputs, weight, by, threads: float_bench(rows, inputs, by.tiles, threads)


@overload(leave, strict=False)
def _leave_by_kind(bench: Any) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda bench: close_tiles()
    if bench.instance_class is FourBench:
        return lambda bench: leave_fours(bench)
    return lambda bench: leave_floats(bench)


@overload(ready, strict=False)
def _ready_by_kind(x: Any, bench: Any) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda x, bench: split_bytes(x, bench)
    if bench.instance_class is FourBench:
        return lambda x, bench: split_fours(x, bench)
    return lambda x, bench: split_floats(x, bench)


@overload(multiply, strict=False)
def _multiply_by_kind(
    x: Any, matrix: Any, first: Any, end: Any, bench: Any, result: Any, place: Any, added: Any
) -> Callable[..., None]:
    if bench.instance_class is ByteBench:
        return lambda x, matrix, first, end, bench, result, place, added: multiply_by_bytes(
            x, matrix, first, end, bench, result, place, added
        )
    if bench.instance_class is FourBench:
        return lambda x, matrix, first, end, bench, result, place, added: multiply_by_fours(
            x, matrix, first, end, bench, result, place, added
        )
    return lambda x, matrix, first, end, bench, result, place, added: multiply_by_floats(
        x, matrix, first, end, bench, result, place, added
    )


@compiled()
def multiply_shared(x: Floats, matrix: Matrix, result: Floats, by: Instructions, threads: int, counts: Places) -> None:
    """`[rows, inputs]` to `[rows, outputs]`, by all threads that call it with the same `counts`."""
    # A word of several weights counts as one: a task reads about as much memory as one of float32.
    outputs, at_once = len(matrix.bias), outputs_at_once(matrix.weight.shape[1])
    tasks = -(-outputs // at_once)
    task = first_task(counts)
    if task < tasks:
        bench = bench_for(len(x), x.shape[1], matrix.weight, by, threads)
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
