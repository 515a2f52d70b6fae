"""AMX, the matrix unit of newer Intel processors: its registers and instructions. Multiplies nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value
from numba.extending import intrinsic

from stitch_server.cpu.features import knows_tiles
from stitch_server.cpu.vectors import INT8, Intrinsic, function

# Rows of a tile register, and numbers of 32 bits in one of them.
SIDE = 16
# Bytes of a tile's row, and of a tile.
LINE = 4 * SIDE
TILE = SIDE * LINE
REGISTERS = 8
# The accumulators: tiles of rows times tiles of outputs, in the first registers.
TILES = 2
SUMS = TILES * TILES


def _typed_open(typing: Any) -> Intrinsic:
    """Configures this thread's tile registers (ldtilecfg), all of them at full size."""
    return types.void(), _open


def _typed_close(typing: Any) -> Intrinsic:
    """Releases the tile registers, so that a context switch need not save them."""
    return types.void(), _close


open_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_open))
close_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_close))


def _open(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not knows_tiles():
        return context.get_dummy_value()
    palette = bytearray(64)
    palette[0] = 1
    for register in range(REGISTERS):
        palette[16 + 2 * register] = LINE
        palette[48 + register] = SIDE
    kept = alloca_once_value(builder, ir.Constant(ir.ArrayType(INT8, len(palette)), palette))  # type: ignore[no-untyped-call]
    instruct(builder, "ldtilecfg", builder.bitcast(kept, INT8.as_pointer()))
    return context.get_dummy_value()


def _close(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if knows_tiles():
        instruct(builder, "tilerelease")
    return context.get_dummy_value()


def at(builder: ir.IRBuilder, data: ir.Value, offset: ir.Value) -> ir.Value:
    """The address `offset` bytes behind `data`."""
    return builder.gep(builder.bitcast(data, INT8.as_pointer()), [offset])


def instruct(builder: ir.IRBuilder, name: str, *operands: ir.Value) -> None:
    """Calls the LLVM intrinsic of an AMX instruction; only where `knows_tiles`."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(function(builder, kind, f"llvm.x86.{name}"), operands)
