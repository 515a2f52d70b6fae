"""Matrix products in tasks that threads share: chooses a kernel by how weights are stored. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from stitch_server.cpu.amx import close_tiles
from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.instructions import Instructions
from stitch_server.cpu.matmul.floating import (
    FloatWorkspace,
    float_workspace,
    multiply_by_floats,
    prepare_floats,
    release_floats,
)
from stitch_server.cpu.matmul.int4 import (
    Int4Workspace,
    int4_workspace,
    multiply_by_int4,
    prepare_int4,
    release_int4,
)
from stitch_server.cpu.matmul.int8 import Int8Workspace, int8_workspace, multiply_by_int8, prepare_int8
from stitch_server.cpu.matmul.matrix import REPLACE, Matrix
from stitch_server.cpu.matmul.panels import LANES, PANELS_OF_FEW
from stitch_server.cpu.scalars import Floats, Indices, Numbers
from stitch_server.cpu.tasks import first_task, next_task, wait_for

# Weights that a task reads: enough for the task to outweigh its bookkeeping, few enough for threads to end together.
TASK_WEIGHTS = 2**15

Workspace = FloatWorkspace | Int8Workspace | Int4Workspace


def workspace_for(rows: int, inputs: int, weight: Numbers, by: Instructions, threads: int) -> Workspace:
    """One thread's buffers for products of so many rows of up to so many inputs, by such weights; to be `release`d.

    Like all functions for several kinds of weights it exists in compiled code alone.
    """
    raise NotImplementedError


def release(workspace: Workspace) -> None:
    """To be called behind a thread's last product."""
    raise NotImplementedError


def prepare(x: Floats, workspace: Workspace) -> None:
    """Brings rows into the form that `multiply` takes; to be called again when `x` has changed."""
    raise NotImplementedError


def multiply(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Workspace,
    result: Floats,
    place: int | np.int64,
    added: np.bool_,
) -> None:
    """Writes outputs [first, end) of `x` `[rows, inputs]` to `result[:, place:]`, or adds them to what is there.

    `first` begins a panel, and `x` was passed to `prepare`. A row's outputs do not depend on the other rows; tiles and
    vectors differ in their last bits.
    """
    raise NotImplementedError


@overload(workspace_for, strict=False)
def _workspace_by_kind(rows: Any, inputs: Any, weight: Any, by: Any, threads: Any) -> Callable[..., Any]:
    if weight.dtype == types.int32:
        return lambda rows, inputs, weight, by, threads: int8_workspace(rows, inputs, threads)
    if weight.dtype == types.uint32:
        return lambda rows, inputs, weight, by, threads: int4_workspace(rows, inputs, by, threads)
    return lambda rows, inputs, weight, by, threads: float_workspace(rows, inputs, by.tiles, threads)


@overload(release, strict=False)
def _release_by_kind(workspace: Any) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda workspace: close_tiles()
    if workspace.instance_class is Int4Workspace:
        return lambda workspace: release_int4(workspace)
    return lambda workspace: release_floats(workspace)


@overload(prepare, strict=False)
def _prepare_by_kind(x: Any, workspace: Any) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda x, workspace: prepare_int8(x, workspace)
    if workspace.instance_class is Int4Workspace:
        return lambda x, workspace: prepare_int4(x, workspace)
    return lambda x, workspace: prepare_floats(x, workspace)


@overload(multiply, strict=False)
def _multiply_by_kind(
    x: Any, matrix: Any, first: Any, end: Any, workspace: Any, result: Any, place: Any, added: Any
) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda x, matrix, first, end, workspace, result, place, added: multiply_by_int8(
            x, matrix, first, end, workspace, result, place, added
        )
    if workspace.instance_class is Int4Workspace:
        return lambda x, matrix, first, end, workspace, result, place, added: multiply_by_int4(
            x, matrix, first, end, workspace, result, place, added
        )
    return lambda x, matrix, first, end, workspace, result, place, added: multiply_by_floats(
        x, matrix, first, end, workspace, result, place, added
    )


@compiled()
def multiply_shared(x: Floats, matrix: Matrix, result: Floats, by: Instructions, threads: int, counts: Indices) -> None:
    """`x` `[rows, inputs]` to `result` `[rows, outputs]`, by all threads that call it with the same `counts`."""
    # A word of several weights counts as one, so that a task of any kind reads about as much memory.
    outputs, at_once = len(matrix.bias), outputs_at_once(matrix.weight.shape[1])
    tasks = -(-outputs // at_once)
    task = first_task(counts)
    if task < tasks:
        workspace = workspace_for(len(x), x.shape[1], matrix.weight, by, threads)
        prepare(x, workspace)
        while task < tasks:
            first = task * at_once
            multiply(x, matrix, first, min(first + at_once, outputs), workspace, result, first, REPLACE)
            task = next_task(counts)
        release(workspace)
    wait_for(counts, tasks)


@compiled()
def outputs_at_once(inputs: int) -> int:
    """How many outputs a task has, in whole panels."""
    width = PANELS_OF_FEW * LANES
    return max(1, TASK_WEIGHTS // (width * inputs)) * width
