"""What rows are multiplied by, and where products go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.loops.numbers import Floats, Numbers

# What becomes of an old result. Not Python's own, for each of which functions would be compiled anew.
ADD, REPLACE = np.bool_(True), np.bool_(False)


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [panels, inputs, LANES], as `panels` says, or [panels, words, LANES]: quads of inputs in whole tiles, as `digits`
    # says, or those of `fours`.
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats
