"""Emits LLVM IR of vector and AMX instructions, for inner loops that no compiler would make of Python.

AMX, the matrix unit of newer Intel CPUs, multiplies tiles: registers of 16 rows by 64 bytes. A kernel configures them
for its thread, and releases them at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, get_or_insert_function
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.features import has_amx_instructions

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SECOND_CACHE = 2
# In bytes.
CACHE_LINE = 64

# What Numba asks of an intrinsic: its signature, and the function that generates its code.
Intrinsic = tuple[Any, Callable[..., ir.Value]]


def float_vector(lanes: int) -> ir.VectorType:
    """The type of a vector of `lanes` float32."""
    return ir.VectorType(ir.FloatType(), lanes)


def unpack_arrays(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> list[Any]:
    """Returns the arguments; arrays give access to their fields."""
    return [
        make_array(kind)(context, builder, argument)  # type: ignore[no-untyped-call]
        if isinstance(kind, types.Array)
        else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    ]


def switch_cases(builder: ir.IRBuilder, number: ir.Value, limit: int) -> Iterator[int]:
    """Emits a switch over `number`, 1 to `limit`: code emitted while a value is yielded is the case of that value."""
    end_block = builder.append_basic_block("end")
    chosen = builder.switch(number, end_block)
    for value in range(1, limit + 1):
        block = builder.append_basic_block(f"case{value}")
        chosen.add_case(INT64(value), block)
        builder.position_at_end(block)
        yield value
        builder.branch(end_block)
    builder.position_at_end(end_block)


def row_of(builder: ir.IRBuilder, array: Any, row: ir.Value) -> ir.Value:
    """Returns the address of a row."""
    stride = builder.extract_value(array.strides, 0)
    begin = builder.gep(builder.bitcast(array.data, INT8.as_pointer()), [builder.mul(row, stride)])
    return builder.bitcast(begin, array.data.type)


def load_as_float32(builder: ir.IRBuilder, address: ir.Value, lanes: int) -> ir.Value:
    """Loads a vector of float32, int8 or the bits of bfloat16, as float32."""
    kind = ir.VectorType(address.type.pointee, lanes)
    numbers = builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
    if kind.element == INT8:
        return builder.sitofp(numbers, float_vector(lanes))
    if kind.element == INT16:
        # A bfloat16 is the upper half of a float32.
        wide = ir.VectorType(INT32, lanes)
        return builder.bitcast(builder.shl(builder.zext(numbers, wide), wide([16] * lanes)), float_vector(lanes))
    return numbers


def broadcast(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    """Returns a vector with a float32 in every lane."""
    nothing = float_vector(lanes)(ir.Undefined)
    one = builder.insert_element(nothing, number, INT32(0))
    return builder.shuffle_vector(one, nothing, ir.VectorType(INT32, lanes)([0] * lanes))


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetches an address, which need not be valid, into the L2 cache."""
    pointer, (for_reading, of_data) = INT8.as_pointer(), (0, 1)
    hints = [INT32(hint) for hint in (for_reading, _SECOND_CACHE, of_data)]
    kind = ir.FunctionType(ir.VoidType(), [pointer, *(hint.type for hint in hints)])
    builder.call(declare_function(builder, kind, "llvm.prefetch.p0"), [builder.bitcast(address, pointer), *hints])


def declare_function(builder: ir.IRBuilder, kind: ir.FunctionType, name: str) -> Any:
    """Declares an intrinsic of LLVM or a function of the C library."""
    return get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]


# Rows of a tile register, and elements of 32 bits in a row.
TILE_SIDE = 16
TILE_ROW_BYTES = 4 * TILE_SIDE
TILE_BYTES = TILE_SIDE * TILE_ROW_BYTES
REGISTERS = 8
# A block of BLOCK_TILES tiles of rows by as many tiles of outputs accumulates in the first registers.
BLOCK_TILES = 2
ACCUMULATORS = BLOCK_TILES * BLOCK_TILES


def _typed_configure(typing: Any) -> Intrinsic:
    """Configures this thread's tile registers (ldtilecfg), all of them at full size."""
    return types.void(), _generate_configure


def _typed_release(typing: Any) -> Intrinsic:
    """Releases the tile registers, so that a context switch need not save them."""
    return types.void(), _generate_release


configure_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_configure))
release_tiles: Callable[[], None] = cast(Any, intrinsic(_typed_release))


def _generate_configure(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if not has_amx_instructions():
        return context.get_dummy_value()
    palette = bytearray(64)
    palette[0] = 1
    for register in range(REGISTERS):
        palette[16 + 2 * register] = TILE_ROW_BYTES
        palette[48 + register] = TILE_SIDE
    configuration = alloca_once_value(builder, ir.Constant(ir.ArrayType(INT8, len(palette)), palette))  # type: ignore[no-untyped-call]
    instruct(builder, "ldtilecfg", builder.bitcast(configuration, INT8.as_pointer()))
    return context.get_dummy_value()


def _generate_release(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    if has_amx_instructions():
        instruct(builder, "tilerelease")
    return context.get_dummy_value()


def byte_offset(builder: ir.IRBuilder, data: ir.Value, offset: ir.Value) -> ir.Value:
    """Returns the address `offset` bytes after `data`."""
    return builder.gep(builder.bitcast(data, INT8.as_pointer()), [offset])


def instruct(builder: ir.IRBuilder, name: str, *operands: ir.Value) -> None:
    """Emits an AMX instruction; only where `has_amx_instructions`."""
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(declare_function(builder, kind, f"llvm.x86.{name}"), operands)


@compiled()
def cache_aligned(size: int) -> NDArray[np.uint8]:
    """Returns `size` bytes, aligned to a cache line: tile rows that span two lines load four times as slowly."""
    buffer = np.empty(size + CACHE_LINE, np.uint8)
    skipped = -buffer.ctypes.data % CACHE_LINE
    return buffer[skipped : skipped + size]
