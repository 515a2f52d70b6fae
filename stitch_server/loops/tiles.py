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
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from stitch_server.loops.numbers import Floats, Numbers, Places

# Rows of either side in a tile, and vectors of a row in a blend.
SIDE = 4
# Numbers in a vector.
LANES = 16
# Numbers of a row in a blend.
STRIP = SIDE * LANES
# Tokens between those that are multiplied and those that are fetched.
AHEAD = 16
CACHE_LINE = 64

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
# Sums may be taken in any order, and a product be added as it is made.
_FLAGS = ("reassoc", "contract", "nsz")
_SECOND_CACHE = 2

_Generated = tuple[Any, Callable[..., ir.Value]]


def _typed_dots(typing: Any, weight: Any, output: Any, x: Any, row: Any) -> _Generated:
    """weight[output + i] · x[row + j] for i and j from 0 to SIDE - 1, that of i and j at SIDE * i + j.

    Both arrays are `[rows, length]` with rows in one piece, x of float32, the weight of float32, int8 or the bits of
    bfloat16. The length is a multiple of LANES.
    """
    sums = types.UniTuple(types.float32, SIDE * SIDE)  # type: ignore[no-untyped-call]
    return sums(weight, types.int64, x, types.int64), _dots


def _typed_blend(typing: Any, values: Any, rows: Any, at: Any, shares: Any, first: Any, mixed: Any) -> _Generated:
    """mixed[i] = Σ shares[first + i, n] · values[rows[n], at : at + STRIP] for i from 0 to SIDE - 1.

    `rows`, int64, are not none. Values are `[all rows, length]` of float32 or the bits of bfloat16, shares
    `[any, at least rows]` and `mixed` `[SIDE, STRIP]` of float32, all with rows in one piece.
    """
    return types.void(values, rows, types.int64, shares, types.int64, mixed), _blend


def _typed_fetched(typing: Any, array: Any, row: Any, place: Any) -> _Generated:
    """Asks for array[row, place], and what lies in its cache line, to be in the second cache soon."""
    return types.void(array, types.int64, types.int64), _fetched


# As compiled functions call them.
dots: Callable[[Numbers, int, Floats, int], tuple[float, ...]] = cast(Any, intrinsic(_typed_dots))
fetched: Callable[[Numbers, int, int], None] = cast(Any, intrinsic(_typed_fetched))
blend: Callable[[Numbers, Places, int, Floats, int, Floats], None] = cast(Any, intrinsic(_typed_blend))


def _dots(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    weight, output, x, row = _opened(context, builder, signature, arguments)
    length = builder.extract_value(weight.shape, 1)
    factors, values = _rows(builder, weight, output), _rows(builder, x, row)
    later = _rows(builder, weight, builder.add(output, _INT64(AHEAD)))
    with _summing(builder, length, LANES) as (place, sums, added):
        for address in later:
            _fetch(builder, builder.gep(address, [place]))
        # All of one side, and one after the other of the other side: twenty-one registers with the sums.
        widened = [_vector(builder, address, place) for address in factors]
        for column, address in enumerate(values):
            value = _vector(builder, address, place)
            added += [(SIDE * line + column, factor, value) for line, factor in enumerate(widened)]
    return context.make_tuple(builder, signature.return_type, [_summed(builder, total) for total in sums])


def _blend(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    values, rows, at, shares, first, mixed = _opened(context, builder, signature, arguments)
    count = builder.extract_value(rows.shape, 0)
    last = builder.sub(count, _INT64(1))
    heads, vectors = _rows(builder, shares, first), [_INT64(number * LANES) for number in range(SIDE)]

    def strip(place: ir.Value) -> ir.Value:
        row = builder.load(builder.gep(rows.data, [place]))
        return builder.gep(_row(builder, values, row), [at])

    with _summing(builder, count, 1) as (place, sums, added):
        later = builder.add(place, _INT64(AHEAD))
        later = strip(builder.select(builder.icmp_signed("<", later, last), later, last))
        now = strip(place)
        for vector in vectors:
            _fetch(builder, builder.gep(later, [vector]))
        widened = [_vector(builder, now, vector) for vector in vectors]
        for line, head in enumerate(heads):
            share = _spread(builder, builder.load(builder.gep(head, [place])))
            added += [(SIDE * line + column, share, value) for column, value in enumerate(widened)]
    for number, address in enumerate(_rows(builder, mixed, _INT64(0))):
        for column, vector in enumerate(vectors):
            target = builder.bitcast(builder.gep(address, [vector]), _FLOATS.as_pointer())
            builder.store(sums[SIDE * number + column], target, align=4)
    return context.get_dummy_value()


def _fetched(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    array, row, place = _opened(context, builder, signature, arguments)
    _fetch(builder, builder.gep(_row(builder, array, row), [place]))
    return context.get_dummy_value()


def _opened(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> list[Any]:
    """The arguments, arrays with their fields."""
    return [
        make_array(kind)(context, builder, argument)  # type: ignore[no-untyped-call]
        if isinstance(kind, types.Array)
        else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    ]


def _row(builder: ir.IRBuilder, array: Any, row: ir.Value) -> ir.Value:
    """Where a row begins."""
    apart = builder.extract_value(array.strides, 0)
    data = builder.bitcast(array.data, _INT8.as_pointer())
    return builder.bitcast(builder.gep(data, [builder.mul(row, apart)]), array.data.type)


def _rows(builder: ir.IRBuilder, array: Any, first: ir.Value) -> list[ir.Value]:
    """Where SIDE rows begin."""
    return [_row(builder, array, builder.add(first, _INT64(number))) for number in range(SIDE)]


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
    place = builder.phi(_INT64)
    running = [builder.phi(_FLOATS) for _ in range(count)]
    sums: list[ir.Value] = []
    added: list[tuple[int, ir.Value, ir.Value]] = []
    yield place, sums, added
    sums += running
    for number, factor, other in added:
        sums[number] = builder.fadd(sums[number], builder.fmul(factor, other, flags=_FLAGS), flags=_FLAGS)
    following = builder.add(place, _INT64(stride))
    place.add_incoming(_INT64(0), before)
    place.add_incoming(following, body)
    for total, later in zip(running, sums, strict=True):
        total.add_incoming(_FLOATS([0.0] * LANES), before)
        total.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, behind)
    builder.position_at_end(behind)


def _vector(builder: ir.IRBuilder, row: ir.Value, place: ir.Value) -> ir.Value:
    """LANES numbers of a row, as float32."""
    address = builder.gep(row, [place])
    kind = ir.VectorType(address.type.pointee, LANES)
    numbers = builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
    if kind.element == _INT8:
        return builder.sitofp(numbers, _FLOATS)
    if kind.element == _INT16:
        # A bfloat16 is the upper half of a float32.
        wide = ir.VectorType(_INT32, LANES)
        return builder.bitcast(builder.shl(builder.zext(numbers, wide), wide([16] * LANES)), _FLOATS)
    return numbers


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector of one number."""
    one = builder.insert_element(_FLOATS(ir.Undefined), number, _INT32(0))
    return builder.shuffle_vector(one, _FLOATS(ir.Undefined), ir.VectorType(_INT32, LANES)([0] * LANES))


def _fetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Asks for an address to be in the second cache soon; there need not be anything at it."""
    pointer = _INT8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    fetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
    for_reading, of_data = 0, 1
    hints = (_INT32(hint) for hint in (for_reading, _SECOND_CACHE, of_data))
    builder.call(fetch, [builder.bitcast(address, pointer), *hints])


def _summed(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """The sum of a vector, halves upon halves."""
    halves = (LANES >> step for step in range(1, LANES.bit_length()))
    return builder.extract_element(reduce(partial(_folded, builder), halves, numbers), _INT32(0))


def _folded(builder: ir.IRBuilder, vector: ir.Value, half: int) -> ir.Value:
    low, high = (
        builder.shuffle_vector(vector, vector.type(ir.Undefined), ir.VectorType(_INT32, half)(list(places)))
        for places in (range(half), range(half, 2 * half))
    )
    return builder.fadd(low, high, flags=_FLAGS)
