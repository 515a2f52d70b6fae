"""Tasks of one call that several threads take in turn, stage by stage. Knows no array but the count of tasks.

Nobody waits for a thread that comes late or is put off: whoever is there takes the next task, and a stage begins when
all tasks before it are done. A thread alone takes them all.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Places
from stitch_server.loops.vectors import INT32, INT64, Generated, function, opened

# Where tasks are counted that were taken, and that are done: apart by a cache line.
_TAKEN, _DONE, _LENGTH = 0, 8, 16
# How often to look, some microseconds, before others may have the core.
_LOOKS = 2_000


def none_taken() -> Places:
    """The counts at the beginning of a call; each of its threads is given the same ones."""
    return np.zeros(_LENGTH, np.int64)


@compiled()
def next_task(counts: Places) -> int:
    """Behind a task that is done: the number of another one, which may be none of this call."""
    _increased(counts, _DONE)
    return _increased(counts, _TAKEN)


@compiled()
def first_task(counts: Places) -> int:
    """The number of a task that nobody else has."""
    return _increased(counts, _TAKEN)


@compiled()
def wait_for(counts: Places, tasks: int) -> None:
    """Returns when so many tasks are done."""
    looks = 0
    while _read(counts, _DONE) < tasks:
        looks += 1
        _rest(looks % _LOOKS == 0)


def _typed_increased(typing: Any, counts: Any, place: Any) -> Generated:
    """Adds one; what was there before. All that was written before is there for whoever sees the sum."""
    return types.int64(counts, types.int64), _generate_increased


def _typed_read(typing: Any, counts: Any, place: Any) -> Generated:
    """What is there, and with it all that was written before by whoever has added to it."""
    return types.int64(counts, types.int64), _generate_read


def _typed_rest(typing: Any, long: Any) -> Generated:
    """For some cycles, or until the core has been offered to others."""
    return types.void(types.boolean), _generate_rest


_increased: Callable[[Places, int], int] = cast(Any, intrinsic(_typed_increased))
_read: Callable[[Places, int], int] = cast(Any, intrinsic(_typed_read))
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
    counts, place = opened(context, builder, signature, arguments)
    return builder.gep(counts.data, [place])
