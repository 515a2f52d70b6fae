"""Array types, and single numbers in compiled code: their conversions and the exponential function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from stitch_server.cpu.compiling import compiled

Floats = NDArray[np.float32]
# float32 or the bits of bfloat16; weights also int8, `int8.Int8Quads` or `int4.Int4Words`.
Numbers = NDArray[Any]
Indices = NDArray[np.int64]

LOG_2_E = 1.44269504
# ln 2 as a sum of two numbers, of which the first has few bits, so that multiples of it are exact.
LN_2 = (0.693359375, -2.12194440e-4)
# The polynomial of Cephes' expf, without its last two terms, 1 + x.
SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def load_as_float32(number: Any) -> Any:
    """Converts a number of any type of `Numbers` to float32. In compiled code only."""
    raise NotImplementedError


@overload(load_as_float32, strict=False)
def _widened_by_kind(number: Any) -> Callable[[Any], Any]:
    if number == types.uint16:
        # A bfloat16 is the upper half of a float32.
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


def narrowed(number: Any, value: Any) -> Any:
    """Converts a float32 `value` to the type of `number`. In compiled code only."""
    raise NotImplementedError


@overload(narrowed, strict=False)
def _narrowed_by_kind(number: Any, value: Any) -> Callable[[Any, Any], Any]:
    if number != types.uint16:
        return lambda number, value: value

    def rounded(number: Any, value: Any) -> Any:
        if np.isnan(value):
            return np.uint16(0x7FC0)
        bits = np.float32(value).view(np.uint32)
        # Round to nearest, ties to even.
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


# No reassociation: it would cancel the two-term reduction.
@compiled(fastmath={"contract"})
def exponential(value: Any) -> Any:
    """exp of a float32, to its last bit or two; unlike a library's it vectorizes."""
    bounded: Any = min(max(value, np.float32(-87)), np.float32(88))
    power = np.floor(bounded * np.float32(LOG_2_E) + np.float32(0.5))
    rest = (bounded - power * np.float32(LN_2[0])) - power * np.float32(LN_2[1])
    series = np.float32(SERIES[0])
    series = series * rest + np.float32(SERIES[1])
    series = series * rest + np.float32(SERIES[2])
    series = series * rest + np.float32(SERIES[3])
    series = series * rest + np.float32(SERIES[4])
    series = series * rest + np.float32(SERIES[5])
    series = series * rest * rest + rest + np.float32(1)
    return series * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
