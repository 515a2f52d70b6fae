"""Matmuls in tasks that threads share: chooses a kernel by the type of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import Instructions
from stitch_server.cpu.matmul.float32 import (
    FloatWorkspace,
    matmul_float,
    new_float_workspace,
    prepare_float,
    release_float,
)
from stitch_server.cpu.matmul.int4 import (
    Int4Workspace,
    matmul_int4,
    new_int4_workspace,
    prepare_int4,
    release_int4,
)
from stitch_server.cpu.matmul.int8 import Int8Workspace, matmul_int8, new_int8_workspace, prepare_int8
from stitch_server.cpu.matmul.panels import FEW_ROWS_PANELS, PANEL_OUTPUTS, REPLACE, Matrix
from stitch_server.cpu.scalars import Floats, Indices, Numbers
from stitch_server.cpu.simd import release_tiles
from stitch_server.cpu.tasks import first_task, next_task, wait_for

# Weights that a task reads: enough to outweigh its bookkeeping, few enough for threads to end together.
WEIGHTS_PER_TASK = 2**15

Workspace = FloatWorkspace | Int8Workspace | Int4Workspace


def new_workspace(rows: int, inputs: int, weight: Numbers, instructions: Instructions, threads: int) -> Workspace:
    """Allocates one thread's buffers for `rows` rows of up to `inputs` inputs, by weights of this type.

    Like all functions here that depend on the weights' type it exists in compiled code alone.
    """
    raise NotImplementedError


def release_workspace(workspace: Workspace) -> None:
    """Releases the thread's tile registers, after its last matmul."""
    raise NotImplementedError


def prepare_input(x: Floats, workspace: Workspace) -> None:
    """Converts rows to the form that `matmul` takes; to be called again when `x` has changed."""
    raise NotImplementedError


def matmul(
    x: Floats,
    matrix: Matrix,
    first: int,
    end: int,
    workspace: Workspace,
    result: Floats,
    column: int | np.int64,
    accumulate: np.bool_,
) -> None:
    """Writes outputs [first, end) of `x` `[rows, inputs]` to `result[:, column:]`, or adds them to what is there.

    `first` begins a panel, and `x` was passed to `prepare_input`. A row's outputs do not depend on the other rows;
    tiles and vectors differ in their last bits.
    """
    raise NotImplementedError


@overload(new_workspace, strict=False)
def _workspace_by_kind(rows: Any, inputs: Any, weight: Any, instructions: Any, threads: Any) -> Callable[..., Any]:
    if weight.dtype == types.int32:
        return lambda rows, inputs, weight, instructions, threads: new_int8_workspace(rows, inputs, threads)
    if weight.dtype == types.uint32:
        return lambda rows, inputs, weight, instructions, threads: new_int4_workspace(
            rows, inputs, instructions, threads
        )
    return lambda rows, inputs, weight, instructions, threads: new_float_workspace(
        rows, inputs, instructions.amx, threads
    )


@overload(release_workspace, strict=False)
def _release_by_kind(workspace: Any) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda workspace: release_tiles()
    if workspace.instance_class is Int4Workspace:
        return lambda workspace: release_int4(workspace)
    return lambda workspace: release_float(workspace)


@overload(prepare_input, strict=False)
def _prepare_by_kind(x: Any, workspace: Any) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda x, workspace: prepare_int8(x, workspace)
    if workspace.instance_class is Int4Workspace:
        return lambda x, workspace: prepare_int4(x, workspace)
    return lambda x, workspace: prepare_float(x, workspace)


@overload(matmul, strict=False)
def _multiply_by_kind(
    x: Any, matrix: Any, first: Any, end: Any, workspace: Any, result: Any, column: Any, accumulate: Any
) -> Callable[..., None]:
    if workspace.instance_class is Int8Workspace:
        return lambda x, matrix, first, end, workspace, result, column, accumulate: matmul_int8(
            x, matrix, first, end, workspace, result, column, accumulate
        )
    if workspace.instance_class is Int4Workspace:
        return lambda x, matrix, first, end, workspace, result, column, accumulate: matmul_int4(
            x, matrix, first, end, workspace, result, column, accumulate
        )
    return lambda x, matrix, first, end, workspace, result, column, accumulate: matmul_float(
        x, matrix, first, end, workspace, result, column, accumulate
    )


@compiled()
def matmul_shared(
    x: Floats, matrix: Matrix, result: Floats, instructions: Instructions, threads: int, counts: Indices
) -> None:
    """Multiplies `x` `[rows, inputs]` into `result` `[rows, outputs]`, on all threads that share `counts`."""
    # A word of several weights counts as one, so that a task of any kind reads about as much memory.
    outputs, at_once = len(matrix.bias), outputs_per_task(matrix.weight.shape[1])
    tasks = -(-outputs // at_once)
    task = first_task(counts)
    if task < tasks:
        workspace = new_workspace(len(x), x.shape[1], matrix.weight, instructions, threads)
        prepare_input(x, workspace)
        while task < tasks:
            first = task * at_once
            matmul(x, matrix, first, min(first + at_once, outputs), workspace, result, first, REPLACE)
            task = next_task(counts)
        release_workspace(workspace)
    wait_for(counts, tasks)


@compiled()
def outputs_per_task(inputs: int) -> int:
    """Returns the number of outputs of a task, in whole panels."""
    width = FEW_ROWS_PANELS * PANEL_OUTPUTS
    return max(1, WEIGHTS_PER_TASK // (width * inputs)) * width
