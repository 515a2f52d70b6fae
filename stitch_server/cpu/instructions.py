"""Which optional instructions of the processor a product may use."""

from __future__ import annotations

from typing import NamedTuple


class Instructions(NamedTuple):
    """Beside vectors, which all processors have."""

    # AMX.
    tiles: bool
    # AVX512-VNNI: products of bytes, four of them added at once.
    dots: bool
