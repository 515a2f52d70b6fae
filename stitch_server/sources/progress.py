"""How a long import tells how far it is. Doesn't know who looks."""

from __future__ import annotations

from collections.abc import Callable

# What is being done, and the share that is done, 0 to 1.
Progress = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Tells nobody."""
