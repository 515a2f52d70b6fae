"""How threads share the work of one call: tasks in stages, handed out by an atomic counter. Knows no other array.

Whoever is there takes the next task, and a stage begins when all tasks before it are done, so nobody waits for a thread
that is late or preempted. A thread alone takes them all.
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
from stitch_server.cpu.vectors import INT32, INT64, Intrinsic, function, unpacked

# Places of the counts of tasks taken and done, a cache line apart.
_TAKEN, _DONE, _LENGTH = 0, 8, 16
# How often to spin, some microseconds, before yielding the core.
_LOOKS = 2_000


def task_counts() -> Indices:
    """Fresh counts for a call; all of its threads share them."""
    return np.zeros(_LENGTH, np.int64)


@compiled()
def next_task(counts: Indices) -> int:
    """Marks a task as done; returns the number of the next one, which may be beyond the last."""
    _increased(counts, _DONE)
    return _increased(counts, _TAKEN)


@compiled()
def first_task(counts: Indices) -> int:
    """The number of a task that no other thread has."""
    return _increased(counts, _TAKEN)


@compiled()
def wait_for(counts: Indices, tasks: int) -> None:
    """Spins until so many tasks are done."""
    looks = 0
    while _read(counts, _DONE) < tasks:
        looks += 1
        _rest(looks % _LOOKS == 0)


def _typed_increased(typing: Any, counts: Any, place: Any) -> Intrinsic:
    """An atomic increment; returns what was there before. Acquires and releases."""
    return types.int64(counts, types.int64), _generate_increased


def _typed_read(typing: Any, counts: Any, place: Any) -> Intrinsic:
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
            builder.call(function(builder, ir.FunctionType(INT32, []), "sched_yield"), [])
        with short:
            if platform.machine() == "x86_64":
                builder.call(function(builder, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])
    return context.get_dummy_value()


def _address(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    counts, place = unpacked(context, builder, signature, arguments)
    return builder.gep(counts.data, [place])
