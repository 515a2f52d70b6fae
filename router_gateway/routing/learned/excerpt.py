"""The part of a text that is looked at, as code points. Knows nothing of what is looked for.

However long a text is, its judgement costs the same: asks stand at the ends of a text, so those are kept.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

HEAD_CHARACTERS = 6_144
TAIL_CHARACTERS = 2_048
EXCERPT_CHARACTERS = HEAD_CHARACTERS + TAIL_CHARACTERS

CodePoints: TypeAlias = NDArray[np.uint32]


def excerpt(text: str) -> str:
    """At most EXCERPT_CHARACTERS of a text, from its two ends."""
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    return text[:HEAD_CHARACTERS] + text[-TAIL_CHARACTERS:]


def code_points(text: str) -> CodePoints:
    """[characters], at most EXCERPT_CHARACTERS: lowering a text may have lengthened it. Lone surrogates pass."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)[:EXCERPT_CHARACTERS]
