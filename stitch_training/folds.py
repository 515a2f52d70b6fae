"""Splits that no prompt straddles. Knows no label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def folds(keys: Sequence[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """[rows]: the fold of every row, 0 … count - 1; rows with one key share a fold. Same seed, same folds."""
    group_of = {key: group for group, key in enumerate(dict.fromkeys(keys))}
    fold_of_group = np.empty(len(group_of), np.int64)
    fold_of_group[np.random.default_rng(seed).permutation(len(group_of))] = np.arange(len(group_of)) % count
    return fold_of_group[[group_of[key] for key in keys]]
