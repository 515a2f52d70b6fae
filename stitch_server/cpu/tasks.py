"""How threads share the work of one call: tasks in stages, handed out by an atomic counter.

Every free thread takes the next task, and a stage begins when all previous tasks are done, so no thread waits for one
that is late or preempted, and a thread alone takes all tasks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.scalars import Indices
from stitch_server.cpu.simd import INT32, INT64, Intrinsic, declare_function, unpack_arrays

# Indices of the counts of tasks taken and done, a cache line apart.
_TAKEN, _DONE, _LENGTH = 0, 8, 16
# How many times to spin, some microseconds, before yielding the core.
_LOOKS = 2_000


def new_task_counts() -> Indices:
    """Returns zeroed counts for one call, which all of its threads share."""
    return np.zeros(_LENGTH, np.int64)


@compiled()
def next_task(counts: Indices) -> int:
    """Marks a task as done; returns the number of the next task, which may be beyond the last."""
    _increased(counts, _DONE)
    return _increased(counts, _TAKEN)


@compiled()
def first_task(counts: Indices) -> int:
    """Returns the number of a task that no other thread has."""
    return _increased(counts, _TAKEN)


@compiled()
def wait_for(counts: Indices, tasks: int) -> None:
    """Spins until `tasks` tasks are done."""
    looks = 0
    while _read(counts, _DONE) < tasks:
        looks += 1
        _rest(looks % _LOOKS == 0)


def _typed_increased(typing: Any, counts: Any, index: Any) -> Intrinsic:
    """An atomic increment that returns the old value. Acquires and releases."""
    return types.int64(counts, types.int64), _generate_increased


def _typed_read(typing: Any, counts: Any, index: Any) -> Intrinsic:
    """An atomic load that acquires."""
    return types.int64(counts, types.int64), _generate_read


def _typed_rest(typing: Any, long: Any) -> Intrinsic:
    """Pauses for some cycles, or yields the core if `long`."""
    return types.void(types.boolean), _generate_rest


_increased: Callable[[Indices, int], int] = cast(Any, intrinsic(_typed_increased))
_read: Callable[[Indices, int], int] = cast(Any, intrinsic(_typed_read))
_rest: Callable[[bool], None] = cast(Any, intrinsic(_typed_rest))


def _generate_increased(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    return builder.atomic_rmw("add", _address(context, builder, signature, arguments), INT64(1), "acq_rel")


def _generate_read(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    return builder.load_atomic(_address(context, builder, signature, arguments), "acquire", align=8)


def _generate_rest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    with builder.if_else(builder.trunc(arguments[0], ir.IntType(1))) as (long, short):
        with long:
            builder.call(declare_function(builder, ir.FunctionType(INT32, []), "sched_yield"), [])
        with short:
            if platform.machine() == "x86_64":
                builder.call(declare_function(builder, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])
    return context.get_dummy_value()


def _address(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    counts, index = unpack_arrays(context, builder, signature, arguments)
    return builder.gep(counts.data, [index])
