"""The micro-kernel of matmuls in vector registers, by a matrix that is packed in panels.

A panel has a vector's worth of outputs: their weights for the first input side by side, then those for the second. So
each output's sum grows in its own lane, in the order of the inputs, independent of the other rows, and needs no
horizontal sum. Two panels by a dozen rows fill the registers, and panels are read in their order in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stitch_server.cpu.scalars import Floats, Numbers
from stitch_server.cpu.simd import (
    INT8,
    INT64,
    Intrinsic,
    broadcast,
    declare_function,
    float_vector,
    load_as_float32,
    prefetch,
    row_of,
    switch_cases,
    unpack_arrays,
)

# Whether a matmul adds to the old result. Python's own booleans would each be a type of their own to Numba.
ADD, REPLACE = np.bool_(True), np.bool_(False)


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [panels, inputs, PANEL_OUTPUTS], or [panels, words, PANEL_OUTPUTS]: four int8 a word (`int8.py`), or eight int4
    # (`int4_layout.py`).
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats


_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
# Outputs of a panel: float32 in a vector.
PANEL_OUTPUTS = 16 if _WIDE else 8
# Panels and rows of a register tile.
PANELS = 2
MAX_ROWS = 12 if _WIDE else 6
# The same for few rows: a sum waits for its previous multiply-add, so several must be in flight.
FEW_ROWS_PANELS = 4
FEW_ROWS = 2
# The distance of the weights' prefetch, in bytes.
PREFETCH_BYTES = 2048

_FLOATS = float_vector(PANEL_OUTPUTS)


def _typed_fma_panels(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> Intrinsic:
    """sums[r, o] = Σ weight[panel, k, o] · x[row + r, k] over the inputs k in [first, end), for `rows` rows.

    Added to what is in `sums`, unless `first` is 0. Rows are 1 to MAX_ROWS, outputs o those of PANELS panels, in
    `sums` `[at least rows, PANELS * PANEL_OUTPUTS]`; where there are fewer panels, the last one is repeated. Arrays are
    contiguous, weights `[panels, inputs, PANEL_OUTPUTS]` of float32, int8 or the bits of bfloat16.
    """
    return _signature(weight, x, sums), partial(_generate_fma_panels, PANELS, MAX_ROWS)


def _typed_fma_panels_few(
    typing: Any, weight: Any, panel: Any, x: Any, row: Any, rows: Any, first: Any, end: Any, sums: Any
) -> Intrinsic:
    """The same for 1 to FEW_ROWS rows and FEW_ROWS_PANELS panels."""
    return _signature(weight, x, sums), partial(_generate_fma_panels, FEW_ROWS_PANELS, FEW_ROWS)


_FmaPanels = Callable[[Numbers, int, Floats, int, int, int, int, Floats], None]
fma_panels: _FmaPanels = cast(Any, intrinsic(_typed_fma_panels))
fma_panels_few: _FmaPanels = cast(Any, intrinsic(_typed_fma_panels_few))


def _signature(weight: Any, x: Any, sums: Any) -> Any:
    int64 = types.int64
    return types.void(weight, int64, x, int64, int64, int64, int64, sums)


def _generate_fma_panels(
    panels: int, most_rows: int, context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    weight, panel, x, row, rows, first, end, sums = unpack_arrays(context, builder, signature, arguments)
    size = builder.mul(builder.extract_value(weight.shape, 1), INT64(PANEL_OUTPUTS))
    last = builder.sub(builder.extract_value(weight.shape, 0), INT64(1))
    begins = []
    for number in range(panels):
        index = builder.add(panel, INT64(number))
        index = builder.select(builder.icmp_signed("<", index, last), index, last)
        begins.append(builder.gep(weight.data, [builder.mul(index, size)]))
    for count in switch_cases(builder, rows, most_rows):
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
    """Emits the loop over inputs, for these panels and rows."""
    addresses = [
        builder.bitcast(builder.gep(sums, [INT64(number * PANEL_OUTPUTS)]), _FLOATS.as_pointer())
        for number in range(len(rows) * len(panels))
    ]
    fresh = builder.icmp_signed("==", first, INT64(0))
    initial_sums = [
        builder.select(fresh, _FLOATS([0.0] * PANEL_OUTPUTS), builder.load(address, align=4)) for address in addresses
    ]
    before, body, end_block = builder.block, builder.append_basic_block("input"), builder.append_basic_block("summed")
    builder.branch(body)
    builder.position_at_end(body)
    column = builder.phi(INT64)
    running = [builder.phi(_FLOATS) for _ in addresses]
    byte_offset = builder.mul(column, INT64(PANEL_OUTPUTS))
    factors = [_fetching(builder, builder.gep(panel, [byte_offset])) for panel in panels]
    next_sums: list[ir.Value] = []
    for row in rows:
        value = broadcast(builder, builder.load(builder.gep(row, [column])), PANEL_OUTPUTS)
        next_sums += [
            _add(builder, factor, value, running[len(next_sums) + number]) for number, factor in enumerate(factors)
        ]
    following = builder.add(column, INT64(1))
    column.add_incoming(first, before)
    column.add_incoming(following, body)
    for total, earlier, later in zip(running, initial_sums, next_sums, strict=True):
        total.add_incoming(earlier, before)
        total.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, end), body, end_block)
    builder.position_at_end(end_block)
    for total, target in zip(next_sums, addresses, strict=True):
        builder.store(total, target, align=4)


def _fetching(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Loads a vector of weights and prefetches later ones."""
    prefetch(builder, builder.gep(builder.bitcast(address, INT8.as_pointer()), [INT64(PREFETCH_BYTES)]))
    return load_as_float32(builder, address, PANEL_OUTPUTS)


def _add(builder: ir.IRBuilder, factor: ir.Value, value: ir.Value, total: ir.Value) -> ir.Value:
    """A fused multiply-add."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(declare_function(builder, kind, f"llvm.fma.v{PANEL_OUTPUTS}f32"), [factor, value, total])
