"""Where models come from: the hub, the package index, a GGUF file, a folder. `resolve.py` makes a folder of each."""

from __future__ import annotations

from collections.abc import Callable

# Reports what a long import is doing, and the fraction that is done, 0 to 1.
Progress = Callable[[str, float], None]


def report_nothing(what: str, fraction: float) -> None:
    """A `Progress` that reports nothing."""
