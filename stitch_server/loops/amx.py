"""AMX, the matrix unit of newer Intel processors: its registers and instructions. Multiplies nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value
from numba.extending import intrinsic

from stitch_server.loops.vectors import INT8, Generated, function
from stitch_server.processor import knows_tiles

# Lines of a tile, and numbers of 32 bits in one.
SIDE = 16
# Bytes of a line, and of a tile.
LINE = 4 * SIDE
TILE = SIDE * LINE
REGISTERS = 8
# Tiles of rows, and of outputs, whose sums are in the first registers at the same time.
TILES = 2
SUMS = TILES * TILES


def _typed_open(typing: Any) -> Generated:
    """Lets this thread use tiles, all of them whole."""
    return types.void(), _open


def _typed_close(typing: Any) -> Generated:
    """Spares whoever gets the core next from keeping them."""
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
    """An address so many bytes behind another one."""
    return builder.gep(builder.bitcast(data, INT8.as_pointer()), [offset])


def instruct(builder: ir.IRBuilder, name: str, *operands: ir.Value) -> None:
    """One of them, where `knows_tiles`."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(function(builder, kind, f"llvm.x86.{name}"), operands)
