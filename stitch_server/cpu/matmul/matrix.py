"""A matrix as kernels take it. Computes nothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stitch_server.cpu.scalars import Floats, Numbers

# What a product does with an old result. Python's own booleans would each compile functions anew.
ADD, REPLACE = np.bool_(True), np.bool_(False)


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias."""

    # [panels, inputs, LANES], (`panels.py`), or [panels, words, LANES]: four int8 a word (`digits.py`), or eight
    # int4 (`int4_layout.py`).
    weight: Numbers
    # [outputs], both float32
    scales: Floats
    bias: Floats
