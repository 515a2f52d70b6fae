"""Whether times tell one kind of request from another, as an observer of a shared cache would try."""

from __future__ import annotations

from collections.abc import Sequence


def overlapping(suspected: Sequence[float], others: Sequence[float]) -> int:
    """How many of the times of suspected requests lie within the range of the others' times.

    All of them: no threshold tells the two kinds apart. None of them: every single request is recognized.
    """
    return sum(min(others) <= seconds <= max(others) for seconds in suspected)
