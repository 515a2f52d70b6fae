"""What a router's regression learns of each prompt: the gains themselves, or their ranks.

    gain    the costlier route's quality minus the cheapest's, as the labels have it
    rank    the gain's rank among those of its source, 0.5 at the median, scaled to the gains' mean and deviation

A ranking is all that thresholds need. Ranks are less sensitive to a few large gains, and gains keep their unit: the
one that ranks better out of fold is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from stitch_training.recovery import Float64Array, apgr, curve

Target: TypeAlias = Literal["gain", "rank"]

TARGETS: tuple[Target, ...] = ("gain", "rank")


def target_qualities(qualities: Float64Array, target: Target) -> Float64Array:
    """Returns qualities [rows, routes] of one source, whose differences from the first route are what is learned."""
    if target == "gain":
        return qualities
    gains = [ranked(column) for column in (qualities - qualities[:, :1]).T[1:]]
    return np.stack([qualities[:, 0], *(qualities[:, 0] + gain for gain in gains)], axis=1)


def ranked(gains: Float64Array) -> Float64Array:
    """Returns the ranks of gains [rows], equal ones sharing theirs, with the mean and the deviation of the gains."""
    ranks: Float64Array = rankdata(gains)
    deviation = ranks.std()
    scale = gains.std() / deviation if deviation > 0 else 0.0
    scaled: Float64Array = (ranks - ranks.mean()) * scale + gains.mean()
    return scaled


def mean_apgr(source: NDArray[np.int64], gains: Float64Array, qualities: Float64Array) -> float | None:
    """Returns the mean APGR of gains [rows, routes] over all sources and costlier routes that have a lead.

    None: no route has a lead over the cheapest in any source.
    """
    found = []
    for index in np.unique(source):
        rows = source == index
        weak = qualities[rows, 0]
        for route in range(1, qualities.shape[1]):
            strong = qualities[rows, route]
            if strong.mean() > weak.mean():
                found.append(apgr(*curve(gains[rows, route], weak, strong)))
    return float(np.mean(found)) if found else None


def best_target(
    source: NDArray[np.int64], unseen: Mapping[Target, Float64Array], qualities: Float64Array
) -> tuple[Target, dict[str, float | None]]:
    """Returns the target whose gains out of fold [rows, routes] rank best, and the mean APGR of each.

    The first one is returned where they rank alike.
    """
    figures = {target: mean_apgr(source, gains, qualities) for target, gains in unseen.items()}
    best = max(figures, key=lambda target: figures[target] or 0.0)
    return best, {str(target): figure for target, figure in figures.items()}
