"""How much of the strong route's lead a ranking of prompts recovers. Knows no router.

PGR  = (r(router) - r(weak)) / (r(strong) - r(weak)), r the mean quality
APGR = the area under PGR over the share of strong calls
CPT(x) = the smallest share of strong calls whose PGR is x

As RouteLLM computes them (arXiv 2406.18665 and `evals/evaluate.py` of its repository): eleven points, at the scores'
0, 10, … 100 % quantiles, a prompt at or above the threshold going to the strong route; the trapezoid rule over the
true shares; CPT by straight lines between the points. A random ranking has APGR .5 and CPT(x) = x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stitch.errors import InvalidRequest

Numbers: TypeAlias = NDArray[np.float64]

STEPS = 10
# Resamples for an interval, and what part of them it holds.
RESAMPLES = 400
COVERED = 0.95


@dataclass(frozen=True)
class Figure:
    """A value and the interval that a bootstrap over the prompts gives it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovery:
    """A ranking's curve, [points] each, and its three figures; CPT as a share, 0 to 1."""

    shares: tuple[float, ...]
    pgr: tuple[float, ...]
    apgr: Figure
    cpt_50: Figure
    cpt_80: Figure


def recovery(scores: Numbers, weak: Numbers, strong: Numbers, seed: int = 0) -> Recovery:
    """The figures of `scores` [prompts], higher asking more for strong, with qualities [prompts].

    Raises InvalidRequest where the strong route is no better than the weak one: there is nothing to recover.
    """
    if not strong.mean() > weak.mean():
        raise InvalidRequest("data", f"{strong.mean():.3f}", f"strong must be better than weak's {weak.mean():.3f}")
    shares, pgr = curve(scores, weak, strong)
    found = np.array([_figures(shares, pgr), *_resampled(scores, weak, strong, seed)])
    tail = (1 - COVERED) / 2
    figures = [Figure(column[0], *np.quantile(column[1:], [tail, 1 - tail]).tolist()) for column in found.T]
    return Recovery(tuple(shares.tolist()), tuple(pgr.tolist()), *figures)


def curve(scores: Numbers, weak: Numbers, strong: Numbers) -> tuple[Numbers, Numbers]:
    """(share of strong, PGR), [STEPS + 1] each, shares rising from 0 to 1."""
    thresholds = np.quantile(scores, np.linspace(1, 0, STEPS + 1))
    taken = scores >= thresholds[:, None]
    taken[0] = False
    quality = np.where(taken, strong, weak).mean(axis=1)
    return taken.mean(axis=1), (quality - weak.mean()) / (strong.mean() - weak.mean())


def apgr(shares: Numbers, pgr: Numbers) -> float:
    """The area under the curve."""
    return float(np.trapezoid(pgr, shares))


def cpt(shares: Numbers, pgr: Numbers, wanted: float) -> float:
    """The share of strong at which the curve first reaches a PGR of `wanted`, 0 < wanted <= 1."""
    point = int(np.argmax(pgr >= wanted))
    rise = (wanted - pgr[point - 1]) / (pgr[point] - pgr[point - 1])
    return float(shares[point - 1] + rise * (shares[point] - shares[point - 1]))


def _figures(shares: Numbers, pgr: Numbers) -> list[float]:
    return [apgr(shares, pgr), cpt(shares, pgr, 0.5), cpt(shares, pgr, 0.8)]


def _resampled(scores: Numbers, weak: Numbers, strong: Numbers, seed: int) -> list[list[float]]:
    """[resamples][figures]; a resample in which strong is no better has no figures and is drawn again."""
    generator = np.random.default_rng(seed)
    found: list[list[float]] = []
    # Twice as many draws at most: where strong hardly leads, there are fewer resamples, not an endless loop.
    for _ in range(2 * RESAMPLES):
        rows = generator.integers(len(scores), size=len(scores))
        if strong[rows].mean() > weak[rows].mean():
            found.append(_figures(*curve(scores[rows], weak[rows], strong[rows])))
        if len(found) == RESAMPLES:
            break
    return found or [_figures(*curve(scores, weak, strong))]
