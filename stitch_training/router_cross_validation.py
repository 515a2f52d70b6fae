"""Gains of every row from a model that has not seen it. Knows no figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stitch_training.folds import folds
from stitch_training.recovery import Numbers
from stitch_training.router_fit import Examples, fit

FOLDS = 5


def unseen_gains(
    examples: Examples, prompts: Sequence[str], count: int = FOLDS, progress: Callable[[int], None] = lambda fold: None
) -> Numbers:
    """[rows, routes]: each fold judged by a model of the others, exactly as a gateway would; first column 0.

    `progress` is called with the number of folds done.
    """
    fold = folds(examples.keys, count)
    gains = np.zeros(examples.qualities.shape)
    for held in range(count):
        model = fit(examples[fold != held])
        for row in np.flatnonzero(fold == held).tolist():
            gains[row] = model.gains(prompts[row])
        progress(held + 1)
    return gains
