"""The microkernel of matrix products in vector registers, by a matrix that is packed in panels. Knows arrays alone.

A panel has a vector's worth of outputs: their weights for the first input side by side, then those for the second. So
each output's sum grows in its own lane, in the order of the inputs, whatever the other rows are, and is never folded.
Two panels by a dozen rows fill the registers, and panels are read in the order in which they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.vectors import (
    INT8,
    INT64,
    Intrinsic,
    broadcast,
    each_case,
    floats,
    function,
    prefetch,
    row_of,
    unpacked,
    widened,
)

_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
# Outputs of a panel: float32 in a vector.
LANES = 16 if _WIDE else 8
# Panels and rows of a register tile.
PANELS = 2
MOST_ROWS = 12 if _WIDE else 6
# The same for few rows: a sum waits for its last product, so several must be under way.
PANELS_OF_FEW = 4
FEW_ROWS = 2
# How many bytes ahead weights are prefetched.
BYTES_AHEAD = 2048

_FLOATS = floats(LANES)


def _typed_add_products(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> Intrinsic:
    """sums[r, o] = Σ weight[panel, k, o] · x[row + r, k] over the inputs k in [first, end), for `rows` rows.

    Added to what is in `sums`, unless `first` is 0. Rows are 1 to MOST_ROWS, outputs o those of PANELS panels, in
    `sums` `[at least rows, PANELS * LANES]`; where there are fewer panels, the last one is repeated. Arrays are
    contiguous, weights `[panels, inputs, LANES]` of float32, int8 or the bits of bfloat16.
    """
    return _signature(weight, x, sums), partial(_add_products, PANELS, MOST_ROWS)


def _typed_add_products_of_few(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> Intrinsic:
    """The same for 1 to FEW_ROWS rows and PANELS_OF_FEW panels."""
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
    weight, panel, x, row, rows, first, end, sums = unpacked(context, builder, signature, arguments)
    size = builder.mul(builder.extract_value(weight.shape, 1), INT64(LANES))
    last = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))
    begins = []
    for number in range(panels):
        one = builder.add(panel, INT64(number))
        one = builder.select(builder.icmp_signed("<", one, last), one, last)
        begins.append(builder.gep(weight.data, [builder.mul(one, size)]))
    for count in each_case(builder, rows, most_rows):
        values = [row_of(builder, x, builder.add(row, INT64(number))) for number in range(count)]
        _sum(builder, begins, values, first, end, sums.data)
    return context.get_dummy_value()


def _sum(
    builder: ir.IRBuilder,
    panels: Sequence[ir.Value],
    rows: Sequence[ir.Value],
    first: ir.Value,
    end: ir.Value,
    sums: ir.Value,
) -> None:
    """The loop over inputs, for these panels and rows."""
    kept = [
        builder.bitcast(builder.gep(sums, [INT64(number * LANES)]), _FLOATS.as_pointer())
        for number in range(len(rows) * len(panels))
    ]
    fresh = builder.icmp_signed("==", first, INT64(0))
    begun = [builder.select(fresh, _FLOATS([0.0] * LANES), builder.load(place, align=4)) for place in kept]
    before, body, behind = builder.block, builder.append_basic_block("input"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    place = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in kept]
    at = builder.mul(place, INT64(LANES))
    factors = [_fetching(builder, builder.gep(panel, [at])) for panel in panels]
    grown: list[ir.Value] = []
    for row in rows:
        value = broadcast(builder, builder.load(builder.gep(row, [place])), LANES)
        grown += [_add(builder, factor, value, running[len(grown) + number]) for number, factor in enumerate(factors)]
    following = builder.add(place, INT64(1))
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
    """Loads a vector of weights and prefetches later ones."""
    prefetch(builder, builder.gep(builder.bitcast(address, INT8.as_pointer()), [INT64(BYTES_AHEAD)]))
    return widened(builder, address, LANES)


def _add(builder: ir.IRBuilder, factor: ir.Value, value: ir.Value, total: ir.Value) -> ir.Value:
    """A fused multiply-add."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(function(builder, kind, f"llvm.fma.v{LANES}f32"), [factor, value, total])
