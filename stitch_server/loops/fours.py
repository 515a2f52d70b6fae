"""Weights in four bits (`words.py`), widened to float32. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats
from stitch_server.loops.panels import LANES
from stitch_server.loops.vectors import INT16, INT32, INT64, Generated, fetch, floats, opened
from stitch_server.loops.words import GROUP, INPUTS, MOST_STEPS, PLACES, WORDS

# [panels, words, LANES]
Fours = NDArray[np.uint32]

_WORDS, _FLOATS = ir.VectorType(INT32, LANES), floats(LANES)


@compiled()
def widen(weight: Fours, panel: int, ahead: int, wide: Floats) -> None:
    """Weights of panels from `panel` on to `[some, inputs, LANES]`; where there are fewer, the last one comes again.

    Those of panels from `ahead` on come to the second cache meanwhile.
    """
    last = len(weight) - 1
    for number in range(len(wide)):
        now, later = min(panel + number, last), min(ahead + number, last)
        for group in range(wide.shape[1] // GROUP):
            _widen(weight, now, later, group, wide, number)


def _typed_widen(typing: Any, weight: Any, panel: Any, ahead: Any, group: Any, wide: Any, number: Any) -> Generated:
    """Weights of a group of weight[panel] to wide[number]; both lie in one piece."""
    whole = types.int64
    return types.void(weight, whole, whole, whole, wide, whole), _generate_widen


_widen: Callable[[Fours, int, int, int, Floats, int], None] = cast(Any, intrinsic(_typed_widen))


def _generate_widen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    weight, panel, ahead, group, wide, number = opened(context, builder, signature, arguments)
    words, step, least = opened_group(
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
    """Where a panel begins."""
    size = builder.mul(builder.extract_value(weight.shape, 1), INT64(LANES))
    return builder.gep(weight.data, [builder.mul(number, size)])


def opened_group(
    builder: ir.IRBuilder, panel: ir.Value, later: ir.Value, group: ir.Value
) -> tuple[list[ir.Value], ir.Value, ir.Value]:
    """Words, step and least weight of a panel's group, while those of a later panel are asked for."""
    begin = builder.mul(group, INT64(WORDS * LANES))
    offsets = [builder.add(begin, INT64(number * LANES)) for number in range(WORDS)]
    for offset in offsets:
        fetch(builder, builder.gep(later, [offset]))
    *words, pair = (
        builder.load(builder.bitcast(builder.gep(panel, [offset]), _WORDS.as_pointer()), align=4) for offset in offsets
    )
    return words, _half(builder, pair), _half(builder, builder.lshr(pair, _WORDS([16] * LANES)))


def _half(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The lower halves as float32."""
    lower = builder.trunc(words, ir.VectorType(INT16, LANES))
    return builder.fpext(builder.bitcast(lower, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
