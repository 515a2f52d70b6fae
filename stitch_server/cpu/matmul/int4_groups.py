"""Dequantizes int4 weights (`int4_layout.py`) to float32. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled
from stitch_server.cpu.matmul.int4_layout import GROUP, INPUTS, MOST_STEPS, PLACES, WORDS
from stitch_server.cpu.matmul.panels import LANES
from stitch_server.cpu.scalars import Floats
from stitch_server.cpu.vectors import INT16, INT32, INT64, Intrinsic, floats, prefetch, unpacked

# [panels, words, LANES]
Int4Words = NDArray[np.uint32]

_WORDS, _FLOATS = ir.VectorType(INT32, LANES), floats(LANES)


@compiled()
def dequantize(weight: Int4Words, panel: int, ahead: int, wide: Floats) -> None:
    """Panels from `panel` on to `wide` `[panels, inputs, LANES]`; where there are fewer, the last one is repeated.

    Panels from `ahead` on are prefetched meanwhile.
    """
    last = len(weight) - 1
    for number in range(len(wide)):
        now, later = min(panel + number, last), min(ahead + number, last)
        for group in range(wide.shape[1] // GROUP):
            _dequantize(weight, now, later, group, wide, number)


def _typed_dequantize(
    typing: Any, weight: Any, panel: Any, ahead: Any, group: Any, wide: Any, number: Any
) -> Intrinsic:
    """One group of weight[panel] to wide[number]; both arrays are contiguous."""
    whole = types.int64
    return types.void(weight, whole, whole, whole, wide, whole), _generate_dequantize


_dequantize: Callable[[Int4Words, int, int, int, Floats, int], None] = cast(Any, intrinsic(_typed_dequantize))


def _generate_dequantize(
    context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]
) -> ir.Value:
    weight, panel, ahead, group, wide, number = unpacked(context, builder, signature, arguments)
    words, step, least = loaded_group(
        builder, panel_at(builder, weight, panel), panel_at(builder, weight, ahead), group
    )
    inputs = builder.mul(number, builder.extract_value(wide.shape, 1))
    inputs = builder.add(inputs, builder.mul(group, INT64(GROUP)))
    for place in range(GROUP):
        shifted = builder.lshr(words[place // INPUTS], _WORDS([PLACES[place % INPUTS]] * LANES))
        steps = builder.sitofp(builder.and_(shifted, _WORDS([MOST_STEPS] * LANES)), _FLOATS)
        # A product of four bits and eleven is exact, so this is rounded once.
        vector = builder.fadd(builder.fmul(steps, step), least)
        target = builder.gep(wide.data, [builder.mul(builder.add(inputs, INT64(place)), INT64(LANES))])
        builder.store(vector, builder.bitcast(target, _FLOATS.as_pointer()), align=4)
    return context.get_dummy_value()


def panel_at(builder: ir.IRBuilder, weight: Any, number: ir.Value) -> ir.Value:
    """The address of a panel."""
    size = builder.mul(builder.extract_value(weight.shape, 1), INT64(LANES))
    return builder.gep(weight.data, [builder.mul(number, size)])


def loaded_group(
    builder: ir.IRBuilder, panel: ir.Value, later: ir.Value, group: ir.Value
) -> tuple[list[ir.Value], ir.Value, ir.Value]:
    """Words, step and least weight of a panel's group; prefetches those of a later panel."""
    begin = builder.mul(group, INT64(WORDS * LANES))
    offsets = [builder.add(begin, INT64(number * LANES)) for number in range(WORDS)]
    for offset in offsets:
        prefetch(builder, builder.gep(later, [offset]))
    *words, pair = (
        builder.load(builder.bitcast(builder.gep(panel, [offset]), _WORDS.as_pointer()), align=4) for offset in offsets
    )
    return words, _half(builder, pair), _half(builder, builder.lshr(pair, _WORDS([16] * LANES)))


def _half(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The lower halves, float16, as float32."""
    lower = builder.trunc(words, ir.VectorType(INT16, LANES))
    return builder.fpext(builder.bitcast(lower, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
