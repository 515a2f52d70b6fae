"""Sixteen sums at a time, written for vector registers: the innermost loops of attention.

What a compiler makes of nested sums keeps them in memory. Here each sum is a register, or sixteen partial sums in one,
and four rows of each side meet in a tile, so that every number is loaded once for four products. Rows that come later
are fetched meanwhile into the second cache, since the first one's fetches are too few for the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.loops.numbers import Floats, Numbers, Places
from stitch_server.loops.vectors import INT32, INT64, Generated, fetch, floats, opened, row_of, spread, widened

# Rows of either side in a tile, and vectors of a row in a blend.
SIDE = 4
# Numbers in a vector.
LANES = 16
# Numbers of a row in a blend.
STRIP = SIDE * LANES
# Tokens between those that are multiplied and those that are fetched.
AHEAD = 16

_FLOATS = floats(LANES)
# Sums may be taken in any order, and a product be added as it is made.
_FLAGS = ("reassoc", "contract", "nsz")


def _typed_dots(typing: Any, weight: Any, output: Any, x: Any, row: Any) -> Generated:
    """weight[output + i] · x[row + j] for i and j from 0 to SIDE - 1, that of i and j at SIDE * i + j.

    Both arrays are `[rows, length]` with rows in one piece, x of float32, the weight of float32, int8 or the bits of
    bfloat16. The length is a multiple of LANES.
    """
    sums = types.UniTuple(types.float32, SIDE * SIDE)  # type: ignore[no-untyped-call]
    return sums(weight, types.int64, x, types.int64), _dots


def _typed_blend(typing: Any, values: Any, rows: Any, at: Any, shares: Any, first: Any, mixed: Any) -> Generated:
    """mixed[i] = Σ shares[first + i, n] · values[rows[n], at : at + STRIP] for i from 0 to SIDE - 1.

    `rows`, int64, are not none. Values are `[all rows, length]` of float32 or the bits of bfloat16, shares
    `[any, at least rows]` and `mixed` `[SIDE, STRIP]` of float32, all with rows in one piece.
    """
    return types.void(values, rows, types.int64, shares, types.int64, mixed), _blend


def _typed_fetched(typing: Any, array: Any, row: Any, place: Any) -> Generated:
    """Asks for array[row, place], and what lies in its cache line, to be in the second cache soon."""
    return types.void(array, types.int64, types.int64), _fetched


# As compiled functions call them.
dots: Callable[[Numbers, int, Floats, int], tuple[float, ...]] = cast(Any, intrinsic(_typed_dots))
fetched: Callable[[Numbers, int, int], None] = cast(Any, intrinsic(_typed_fetched))
blend: Callable[[Numbers, Places, int, Floats, int, Floats], None] = cast(Any, intrinsic(_typed_blend))


def _dots(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    weight, output, x, row = opened(context, builder, signature, arguments)
    length = builder.extract_value(weight.shape, 1)
    factors, values = _rows(builder, weight, output), _rows(builder, x, row)
    later = _rows(builder, weight, builder.add(output, INT64(AHEAD)))
    with _summing(builder, length, LANES) as (place, sums, added):
        for address in later:
            fetch(builder, builder.gep(address, [place]))
        # All of one side, and one after the other of the other side: twenty-one registers with the sums.
        wide = [widened(builder, builder.gep(address, [place]), LANES) for address in factors]
        for column, address in enumerate(values):
            value = widened(builder, builder.gep(address, [place]), LANES)
            added += [(SIDE * line + column, factor, value) for line, factor in enumerate(wide)]
    return context.make_tuple(builder, signature.return_type, [_summed(builder, total) for total in sums])


def _blend(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    values, rows, at, shares, first, mixed = opened(context, builder, signature, arguments)
    count = builder.extract_value(rows.shape, 0)
    last = builder.sub(count, INT64(1))
    heads, vectors = _rows(builder, shares, first), [INT64(number * LANES) for number in range(SIDE)]

    def strip(place: ir.Value) -> ir.Value:
        row = builder.load(builder.gep(rows.data, [place]))
        return builder.gep(row_of(builder, values, row), [at])

    with _summing(builder, count, 1) as (place, sums, added):
        later = builder.add(place, INT64(AHEAD))
        later = strip(builder.select(builder.icmp_signed("<", later, last), later, last))
        now = strip(place)
        for vector in vectors:
            fetch(builder, builder.gep(later, [vector]))
        wide = [widened(builder, builder.gep(now, [vector]), LANES) for vector in vectors]
        for line, head in enumerate(heads):
            share = spread(builder, builder.load(builder.gep(head, [place])), LANES)
            added += [(SIDE * line + column, share, value) for column, value in enumerate(wide)]
    for number, address in enumerate(_rows(builder, mixed, INT64(0))):
        for column, vector in enumerate(vectors):
            target = builder.bitcast(builder.gep(address, [vector]), _FLOATS.as_pointer())
            builder.store(sums[SIDE * number + column], target, align=4)
    return context.get_dummy_value()


def _fetched(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    array, row, place = opened(context, builder, signature, arguments)
    fetch(builder, builder.gep(row_of(builder, array, row), [place]))
    return context.get_dummy_value()


def _rows(builder: ir.IRBuilder, array: Any, first: ir.Value) -> list[ir.Value]:
    """Where SIDE rows begin."""
    return [row_of(builder, array, builder.add(first, INT64(number))) for number in range(SIDE)]


@contextmanager
def _summing(
    builder: ir.IRBuilder, end: ir.Value, stride: int, count: int = SIDE * SIDE
) -> Iterator[tuple[ir.Value, list[ir.Value], list[tuple[int, ir.Value, ir.Value]]]]:
    """A loop from 0 to `end`, which is not 0, over so many vectors of sums that begin at zero.

    Gives the place, and a list to which its body appends (which sum, a factor, another one); behind it the sums.
    """
    before, body, behind = builder.block, builder.append_basic_block("sum"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    place = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in range(count)]
    sums: list[ir.Value] = []
    added: list[tuple[int, ir.Value, ir.Value]] = []
    yield place, sums, added
    sums += running
    for number, factor, other in added:
        sums[number] = builder.fadd(sums[number], builder.fmul(factor, other, flags=_FLAGS), flags=_FLAGS)
    following = builder.add(place, INT64(stride))
    place.add_incoming(INT64(0), before)
    place.add_incoming(following, body)
    for total, later in zip(running, sums, strict=True):
        total.add_incoming(_FLOATS([0.0] * LANES), before)
        total.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, behind)
    builder.position_at_end(behind)


def _summed(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """The sum of a vector, halves upon halves."""
    halves = (LANES >> step for step in range(1, LANES.bit_length()))
    return builder.extract_element(reduce(partial(_folded, builder), halves, numbers), INT32(0))


def _folded(builder: ir.IRBuilder, vector: ir.Value, half: int) -> ir.Value:
    low, high = (
        builder.shuffle_vector(vector, vector.type(ir.Undefined), ir.VectorType(INT32, half)(list(places)))
        for places in (range(half), range(half, 2 * half))
    )
    return builder.fadd(low, high, flags=_FLAGS)
