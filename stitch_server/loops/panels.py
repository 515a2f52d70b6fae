"""Products by a matrix that is kept in panels: the innermost loop, for all that multiplies. Knows arrays alone.

A panel has a vector's worth of outputs: their weights for the first input side by side, then those for the second. So
a sum for each output grows in its own lane, in the order of the inputs, whatever rows come with it, and nothing has to
be folded. Two panels and up to a dozen rows fill the registers, and panels lie in memory as they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from stitch_server.loops.numbers import Floats, Numbers

_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
# Outputs of a panel: numbers in a vector.
LANES = 16 if _WIDE else 8
# Panels, and rows, in the registers at the same time.
PANELS = 2
MOST_ROWS = 12 if _WIDE else 6
# The same where rows are few: a sum waits for its last product, so there must be some sums.
PANELS_OF_FEW = 4
FEW_ROWS = 2
# How far ahead of what is multiplied weights are fetched, in bytes.
BYTES_AHEAD = 2048

_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_SECOND_CACHE = 2


def _typed_add_products(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """sums[r, o] = Σ weight[panel, k, o] · x[row + r, k] over the inputs k in [first, end), for `rows` rows.

    Added to what is in `sums`, unless `first` is 0. Rows are 1 to MOST_ROWS, outputs o those of PANELS panels, in
    `sums` `[at least rows, PANELS * LANES]`; where there are fewer panels, the last one comes again. Arrays lie in one
    piece, those of weights `[panels, inputs, LANES]` of float32, int8 or the bits of bfloat16.
    """
    return _signature(weight, x, sums), partial(_add_products, PANELS, MOST_ROWS)


def _typed_add_products_of_few(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """The same of 1 to FEW_ROWS rows and PANELS_OF_FEW panels."""
    return _signature(weight, x, sums), partial(_add_products, PANELS_OF_FEW, FEW_ROWS)


_Product = Callable[[Numbers, int, Floats, int, int, int, int, Floats], None]
add_products: _Product = cast(Any, intrinsic(_typed_add_products))
add_products_of_few: _Product = cast(Any, intrinsic(_typed_add_products_of_few))


def _signature(weight: Any, x: Any, sums: Any) -> Any:
    whole = types.int64
    return types.void(weight, whole, x, whole, whole, whole, whole, sums)


def _add_products(
    panels: int, most_rows: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    weight, panel, x, row, rows, first, end, sums = (
        make_array(kind)(context, builder, argument)  # type: ignore[no-untyped-call]
        if isinstance(kind, types.Array)
        else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    )
    size = builder.mul(builder.extract_value(weight.shape, 1), _INT64(LANES))
    last = builder.sub(builder.extract_value(weight.shape, 0), _INT64(1))
    begins = []
    for number in range(panels):
        one = builder.add(panel, _INT64(number))
        one = builder.select(builder.icmp_signed("<", one, last), one, last)
        begins.append(builder.gep(weight.data, [builder.mul(one, size)]))
    apart = builder.extract_value(x.strides, 0)
    behind = builder.append_basic_block("multiplied")
    chosen = builder.switch(rows, behind)
    for count in range(1, most_rows + 1):
        block = builder.append_basic_block(f"rows{count}")
        chosen.add_case(_INT64(count), block)
        builder.position_at_end(block)
        values = [_row(builder, x.data, apart, builder.add(row, _INT64(number))) for number in range(count)]
        _sum(builder, begins, values, first, end, sums.data)
        builder.branch(behind)
    builder.position_at_end(behind)
    return context.get_dummy_value()


def _row(builder: ir.IRBuilder, data: ir.Value, apart: ir.Value, row: ir.Value) -> ir.Value:
    begin = builder.gep(builder.bitcast(data, _INT8.as_pointer()), [builder.mul(row, apart)])
    return builder.bitcast(begin, data.type)


def _sum(
    builder: ir.IRBuilder,
    panels: Sequence[ir.Value],
    rows: Sequence[ir.Value],
    first: ir.Value,
    end: ir.Value,
    sums: ir.Value,
) -> None:
    """One loop over the inputs, for these panels and rows."""
    kept = [
        builder.bitcast(builder.gep(sums, [_INT64(number * LANES)]), _FLOATS.as_pointer())
        for number in range(len(rows) * len(panels))
    ]
    fresh = builder.icmp_signed("==", first, _INT64(0))
    begun = [builder.select(fresh, _FLOATS([0.0] * LANES), builder.load(place, align=4)) for place in kept]
    before, body, behind = builder.block, builder.append_basic_block("input"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    place = builder.phi(_INT64)
    running = [builder.phi(_FLOATS) for _ in kept]
    at = builder.mul(place, _INT64(LANES))
    factors = [_fetching(builder, builder.gep(panel, [at])) for panel in panels]
    grown: list[ir.Value] = []
    for row in rows:
        value = _spread(builder, builder.load(builder.gep(row, [place])))
        grown += [_add(builder, factor, value, running[len(grown) + number]) for number, factor in enumerate(factors)]
    following = builder.add(place, _INT64(1))
    place.add_incoming(first, before)
    place.add_incoming(following, body)
    for total, earlier, later in zip(running, begun, grown, strict=True):
        total.add_incoming(earlier, before)
        total.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, behind)
    builder.position_at_end(behind)
    for total, target in zip(grown, kept, strict=True):
        builder.store(total, target, align=4)


def _fetching(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A vector of weights as float32, while later ones are asked for; there need not be any."""
    kind = ir.VectorType(address.type.pointee, LANES)
    numbers = builder.load(builder.bitcast(address, kind.as_pointer()), align=1)
    pointer = _INT8.as_pointer()
    for_reading, of_data = 0, 1
    hints = [_INT32(hint) for hint in (for_reading, _SECOND_CACHE, of_data)]
    later = builder.gep(builder.bitcast(address, pointer), [_INT64(BYTES_AHEAD)])
    fetch = ir.FunctionType(ir.VoidType(), [pointer, *(hint.type for hint in hints)])
    builder.call(_function(builder, fetch, "llvm.prefetch.p0"), [later, *hints])
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


def _add(builder: ir.IRBuilder, factor: ir.Value, value: ir.Value, total: ir.Value) -> ir.Value:
    """In one step, rounded once."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(_function(builder, kind, f"llvm.fma.v{LANES}f32"), [factor, value, total])


def _function(builder: ir.IRBuilder, kind: ir.FunctionType, name: str) -> Any:
    return get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
