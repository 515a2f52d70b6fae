"""LLVM IR of vector instructions, for loops that no compiler would make of Python. Knows no loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.np.arrayobj import make_array

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SECOND_CACHE = 2
# In bytes.
CACHE_LINE = 64

# What Numba asks of an intrinsic: its signature, and who generates it.
Intrinsic = tuple[Any, Callable[..., ir.Value]]


def floats(lanes: int) -> ir.VectorType:
    """A vector of so many float32."""
    return ir.VectorType(ir.FloatType(), lanes)


def unpacked(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> list[Any]:
    """The arguments, arrays with access to their fields."""
    return [
        make_array(kind)(context, builder, argument)  # type: ignore[no-untyped-call]
        if isinstance(kind, types.Array)
        else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    ]


def each_case(builder: ir.IRBuilder, number: ir.Value, most: int) -> Iterator[int]:
    """A switch over `number`, 1 to `most`: what is emitted while a value is yielded is its case."""
    behind = builder.append_basic_block("behind")
    chosen = builder.switch(number, behind)
    for value in range(1, most + 1):
        block = builder.append_basic_block(f"case{value}")
        chosen.add_case(INT64(value), block)
        builder.position_at_end(block)
        yield value
        builder.branch(behind)
    builder.position_at_end(behind)


def row_of(builder: ir.IRBuilder, array: Any, row: ir.Value) -> ir.Value:
    """The address of a row."""
    apart = builder.extract_value(array.strides, 0)
    begin = builder.gep(builder.bitcast(array.data, INT8.as_pointer()), [builder.mul(row, apart)])
    return builder.bitcast(begin, array.data.type)


def widened(builder: ir.IRBuilder, address: ir.Value, lanes: int) -> ir.Value:
    """Loads a vector of float32, int8 or the bits of bfloat16, as float32."""
    kind = ir.VectorType(address.type.pointee, lanes)
    numbers = builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
    if kind.element == INT8:
        return builder.sitofp(numbers, floats(lanes))
    if kind.element == INT16:
        # A bfloat16 is the upper half of a float32.
        wide = ir.VectorType(INT32, lanes)
        return builder.bitcast(builder.shl(builder.zext(numbers, wide), wide([16] * lanes)), floats(lanes))
    return numbers


def broadcast(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    """A float32 in every lane of a vector."""
    nothing = floats(lanes)(ir.Undefined)
    one = builder.insert_element(nothing, number, INT32(0))
    return builder.shuffle_vector(one, nothing, ir.VectorType(INT32, lanes)([0] * lanes))


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetches an address, which need not be valid, into the L2 cache."""
    pointer, (for_reading, of_data) = INT8.as_pointer(), (0, 1)
    hints = [INT32(hint) for hint in (for_reading, _SECOND_CACHE, of_data)]
    kind = ir.FunctionType(ir.VoidType(), [pointer, *(hint.type for hint in hints)])
    builder.call(function(builder, kind, "llvm.prefetch.p0"), [builder.bitcast(address, pointer), *hints])


def function(builder: ir.IRBuilder, kind: ir.FunctionType, name: str) -> Any:
    """Declares an intrinsic of LLVM or a function of the C library."""
    return get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
