"""Where the training of a cut starts: a closed form, and what it does with the first token. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stitch_training.frozen_models import Pair
from stitch_training.least_squares import AffineMap, RidgeFit
from stitch_training.readout import readout
from stitch_training.run_directory import Passes
from stitch_training.sums import ClosedForm, Cut
from stitch_training.trainable_stitch import Coordinates

# What least squares aims at: the top model's own states, or states that its head reads as the bottom's answers.
Aim = Literal["states", "answers"]
# Damping of the coordinates that training moves in, unless the ridge asks for more: directions with less than this
# share of the mean variance are not blown up to unit variance, or they would only carry noise.
WHITENING_RIDGE = 1e-3


@dataclass(frozen=True)
class Start:
    """A map in closed form, the ridge regression behind it, and where it takes the mean state of first tokens."""

    map: AffineMap
    ridge: RidgeFit
    # [outputs]
    first: Tensor


def start_of(pair: Pair, cut: Cut, passes: Passes, closed: ClosedForm, aim: Aim) -> Start:
    """The start of a cut; with the aim `answers` both traces must have the bottom's last depth."""
    k, j = cut
    if aim == "answers":
        stitch, ridge = readout(pair, k, passes, closed)
        return Start(stitch, ridge, stitch.weight @ closed.first_state(k) + stitch.bias)
    ridge, first = closed.ridge_fit(cut), closed.first_target(j)
    return Start(closed.hold_first(k, ridge.map, first, ridge.ridge), ridge, first)


def coordinates(k: int, start: Start, closed: ClosedForm) -> Coordinates:
    """What training of a stitch behind `k` layers moves in, from the sums alone."""
    spread = closed.spread(k)
    # Deviations of what the start predicts: nearly those of the targets, and known without another sum.
    return Coordinates(
        weight=start.map.weight.float(),
        bias=start.map.bias.float(),
        mean=spread.mean.float(),
        whitening=spread.whitening(max(WHITENING_RIDGE, start.ridge.ridge)).float(),
        deviations=spread.variances(start.map.weight).sqrt().float(),
        first=start.first.float(),
    )


def needed(cut: Cut, depth: int, aim: Aim) -> tuple[tuple[Cut, ...], Callable[[tuple[Cut, ...]], bool]]:
    """The cuts that a pass for this one sums, and whether those of an earlier pass will do as well."""
    if aim == "states":
        return (cut,), lambda found: cut in found
    return (cut, (depth, cut[1])), lambda found: {cut[0], depth} <= {k for k, _ in found}
