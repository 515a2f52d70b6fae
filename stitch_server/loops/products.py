"""Products of a few rows by a matrix: bound by reading it, one row of weights behind the other. Knows arrays alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.compiling import compiled
from stitch_server.loops.numbers import Floats, Numbers, widened
from stitch_server.loops.tiles import LANES, SIDE, STRIP, dots, line


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [outputs, inputs]
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats


@compiled()
def multiply(x: Floats, matrix: Matrix, result: Floats) -> None:
    """`[rows, inputs]` to `[rows, outputs]`."""
    outputs, inputs = matrix.weight.shape
    tiled = 0
    if len(x) >= SIDE and inputs % LANES == 0:
        tiled = outputs - outputs % SIDE
        for output in range(0, tiled, SIDE):
            for begin in range(0, len(x), SIDE):
                # The last four rows may have been in another tile, too.
                row = min(begin, len(x) - SIDE)
                sums = dots(matrix.weight, output, x, row)
                for place in range(SIDE * SIDE):
                    at = output + place // SIDE
                    result[row + place % SIDE, at] = sums[place] * matrix.scales[at] + matrix.bias[at]
    for output in range(tiled, outputs):
        factors = matrix.weight[output]
        for row in range(len(x)):
            total = np.float32(0)
            # Of bfloat16 the compiler's own loop is the faster one.
            if inputs % STRIP == 0 and matrix.weight.itemsize != 2:
                total += line(matrix.weight, output, x, row)
            else:
                for place in range(inputs):
                    total += widened(factors[place]) * x[row, place]
            result[row, output] = total * matrix.scales[output] + matrix.bias[output]
