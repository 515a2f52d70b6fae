"""The halves of a softmax: the largest score, and what all become below it. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range_slice
from numba.extending import intrinsic

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, exponential
from stitch_server.loops.vectors import INT64, Generated, floats, function, opened

# Numbers in a vector.
LANES = 16
_FLOATS = floats(LANES)


@compiled()
def largest(scores: Floats, before: Any) -> Any:
    """Of `[scores]` and one that was `before` them."""
    whole = scores.size - scores.size % LANES
    found = max(before, _largest(scores, whole))
    for place in range(whole, scores.size):
        found = max(found, scores[place])
    return found


@compiled()
def shares(scores: Floats, most: Any) -> Any:
    """Makes e to the power of what each is above `most` of it; their sum."""
    total = np.float32(0)
    for place in range(scores.size):
        scores[place] = exponential(scores[place] - most)
        total += scores[place]
    return total


def _typed_largest(typing: Any, scores: Any, end: Any) -> Generated:
    """The largest of scores[:end], which lie in one piece, by vectors; the end is a multiple of LANES."""
    return types.float32(scores, types.int64), _generate_largest


_largest: Callable[[Floats, int], float] = cast(Any, intrinsic(_typed_largest))


def _generate_largest(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    scores, end = opened(context, builder, signature, arguments)
    found = alloca_once_value(builder, _FLOATS([float("-inf")] * LANES))  # type: ignore[no-untyped-call]
    with for_range_slice(builder, INT64(0), end, INT64(LANES)) as (place, _):
        address = builder.bitcast(builder.gep(scores.data, [place]), _FLOATS.as_pointer())
        numbers, so_far = builder.load(address, align=4), builder.load(found)
        builder.store(builder.select(builder.fcmp_ordered(">", numbers, so_far), numbers, so_far), found)
    kind = ir.FunctionType(ir.FloatType(), [_FLOATS])
    return builder.call(function(builder, kind, f"llvm.vector.reduce.fmax.v{LANES}f32"), [builder.load(found)])
