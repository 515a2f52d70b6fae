"""Which instructions of a processor a product may use."""

from __future__ import annotations

from typing import NamedTuple


class Instructions(NamedTuple):
    """Beside those that all have."""

    # Products of tiles, for as many rows as are worth it.
    tiles: bool
    # Products of bytes, four of them added at once.
    dots: bool
