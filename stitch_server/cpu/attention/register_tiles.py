"""The micro-kernels of attention in vector registers: tiles of 4 × 4 sums.

A compiler keeps nested sums in memory. Here each sum is a register, or sixteen partial sums in one, and four rows of
either operand meet in a tile, so that every element is loaded once for four products. Later rows are prefetched into
the L2 cache meanwhile, since the L1 has too few outstanding fetches for the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.cpu.scalars import Floats, Indices, Numbers
from stitch_server.cpu.simd import (
    INT32,
    INT64,
    Intrinsic,
    broadcast,
    float_vector,
    load_as_float32,
    prefetch,
    row_of,
    unpack_arrays,
)

# Rows of either operand in a tile, and vectors of a row in `weighted_sums`.
TILE_SIDE = 4
# Float32 of a vector.
LANES = 16
# Elements of a row in `weighted_sums`.
STRIP = TILE_SIDE * LANES
# The distance of the prefetch, in tokens, from those that are multiplied.
AHEAD = 16

_FLOATS = float_vector(LANES)
# Sums may be taken in any order, and a product be added as it is made.
_FLAGS = ("reassoc", "contract", "nsz")


def _typed_dots(typing: Any, weight: Any, output: Any, x: Any, row: Any) -> Intrinsic:
    """weight[output + i] · x[row + j] for i and j from 0 to TILE_SIDE - 1, at [TILE_SIDE * i + j].

    Both arrays are `[rows, length]` with contiguous rows, x of float32, the weight of float32, int8 or the bits of
    bfloat16. The length is a multiple of LANES.
    """
    sums = types.UniTuple(types.float32, TILE_SIDE * TILE_SIDE)  # type: ignore[no-untyped-call]
    return sums(weight, types.int64, x, types.int64), _generate_dots


def _typed_weighted_sums(
    typing: Any, values: Any, rows: Any, at: Any, weights: Any, first: Any, attended: Any
) -> Intrinsic:
    """attended[i] = Σ weights[first + i, n] · values[rows[n], at : at + STRIP] for i from 0 to TILE_SIDE - 1.

    `rows`, int64, are at least one. Values are `[all rows, length]` of float32 or the bits of bfloat16, weights
    `[any, at least rows]` and `attended` `[TILE_SIDE, STRIP]` of float32, all with contiguous rows.
    """
    return types.void(values, rows, types.int64, weights, types.int64, attended), _generate_weighted_sums


def _typed_prefetch_element(typing: Any, array: Any, row: Any, index: Any) -> Intrinsic:
    """Prefetches the cache line of array[row, index] into the L2 cache."""
    return types.void(array, types.int64, types.int64), _generate_prefetch_element


# As compiled functions call them.
dots: Callable[[Numbers, int, Floats, int], tuple[float, ...]] = cast(Any, intrinsic(_typed_dots))
prefetch_element: Callable[[Numbers, int, int], None] = cast(Any, intrinsic(_typed_prefetch_element))
weighted_sums: Callable[[Numbers, Indices, int, Floats, int, Floats], None] = cast(Any, intrinsic(_typed_weighted_sums))


def _generate_dots(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    weight, output, x, row = unpack_arrays(context, builder, signature, arguments)
    length = builder.extract_value(weight.shape, 1)
    factors, values = _row_addresses(builder, weight, output), _row_addresses(builder, x, row)
    prefetched = _row_addresses(builder, weight, builder.add(output, INT64(AHEAD)))
    with _summing(builder, length, LANES) as (index, sums, accumulate):
        for address in prefetched:
            prefetch(builder, builder.gep(address, [index]))
        # All four rows of one operand and one at a time of the other: twenty-one registers with the sums.
        wide = [load_as_float32(builder, builder.gep(address, [index]), LANES) for address in factors]
        for column, address in enumerate(values):
            value = load_as_float32(builder, builder.gep(address, [index]), LANES)
            accumulate += [(TILE_SIDE * line + column, factor, value) for line, factor in enumerate(wide)]
    return context.make_tuple(builder, signature.return_type, [_summed(builder, total) for total in sums])


def _generate_weighted_sums(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    values, rows, at, weights, first, attended = unpack_arrays(context, builder, signature, arguments)
    count = builder.extract_value(rows.shape, 0)
    last = builder.sub(count, INT64(1))
    heads, vectors = _row_addresses(builder, weights, first), [INT64(number * LANES) for number in range(TILE_SIDE)]

    def strip(index: ir.Value) -> ir.Value:
        row = builder.load(builder.gep(rows.data, [index]))
        return builder.gep(row_of(builder, values, row), [at])

    with _summing(builder, count, 1) as (index, sums, accumulate):
        prefetched = builder.add(index, INT64(AHEAD))
        prefetched = strip(builder.select(builder.icmp_signed("<", prefetched, last), prefetched, last))
        now = strip(index)
        for vector in vectors:
            prefetch(builder, builder.gep(prefetched, [vector]))
        wide = [load_as_float32(builder, builder.gep(now, [vector]), LANES) for vector in vectors]
        for line, head in enumerate(heads):
            share = broadcast(builder, builder.load(builder.gep(head, [index])), LANES)
            accumulate += [(TILE_SIDE * line + column, share, value) for column, value in enumerate(wide)]
    for number, address in enumerate(_row_addresses(builder, attended, INT64(0))):
        for column, vector in enumerate(vectors):
            target = builder.bitcast(builder.gep(address, [vector]), _FLOATS.as_pointer())
            builder.store(sums[TILE_SIDE * number + column], target, align=4)
    return context.get_dummy_value()


def _generate_prefetch_element(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    array, row, index = unpack_arrays(context, builder, signature, arguments)
    prefetch(builder, builder.gep(row_of(builder, array, row), [index]))
    return context.get_dummy_value()


def _row_addresses(builder: ir.IRBuilder, array: Any, first: ir.Value) -> list[ir.Value]:
    """Returns the addresses of TILE_SIDE rows."""
    return [row_of(builder, array, builder.add(first, INT64(number))) for number in range(TILE_SIDE)]


@contextmanager
def _summing(
    builder: ir.IRBuilder, end: ir.Value, stride: int, count: int = TILE_SIDE * TILE_SIDE
) -> Iterator[tuple[ir.Value, list[ir.Value], list[tuple[int, ir.Value, ir.Value]]]]:
    """Emits a loop from 0 to `end`, which is not 0, over `count` vectors of sums that begin at zero.

    Yields the index, and a list to which the body appends (which sum, a factor, another factor); after it the sums.
    """
    before, body, end_block = builder.block, builder.append_basic_block("sum"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in range(count)]
    sums: list[ir.Value] = []
    accumulate: list[tuple[int, ir.Value, ir.Value]] = []
    yield index, sums, accumulate
    sums += running
    for number, factor, other in accumulate:
        sums[number] = builder.fadd(sums[number], builder.fmul(factor, other, flags=_FLAGS), flags=_FLAGS)
    following = builder.add(index, INT64(stride))
    index.add_incoming(INT64(0), before)
    index.add_incoming(following, body)
    for total, prefetched in zip(running, sums, strict=True):
        total.add_incoming(_FLOATS([0.0] * LANES), before)
        total.add_incoming(prefetched, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, end_block)
    builder.position_at_end(end_block)


def _summed(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """The horizontal sum of a vector, folding halves."""
    halves = (LANES >> step for step in range(1, LANES.bit_length()))
    return builder.extract_element(reduce(partial(_folded, builder), halves, numbers), INT32(0))


def _folded(builder: ir.IRBuilder, vector: ir.Value, half: int) -> ir.Value:
    low, high = (
        builder.shuffle_vector(vector, vector.type(ir.Undefined), ir.VectorType(INT32, half)(list(lanes)))
        for lanes in (range(half), range(half, 2 * half))
    )
    return builder.fadd(low, high, flags=_FLAGS)
