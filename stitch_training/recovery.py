"""How much of the strong route's lead in quality a ranking of prompts recovers: PGR, APGR and CPT.

PGR  = (r(router) - r(weak)) / (r(strong) - r(weak)), r the mean quality
APGR = the area under PGR over the share of strong calls
CPT(x) = the smallest share of strong calls whose PGR is x

As RouteLLM computes them (arXiv 2406.18665 and `evals/evaluate.py` of its repository): eleven points, at the scores'
0, 10, … 100 % quantiles, a prompt at or above the threshold going to the strong route; the trapezoid rule over the
true shares; CPT, and PGR at a share, by straight lines between the points. A random ranking has APGR 0.5, CPT(x) = x
and a PGR equal to the share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stitch.errors import InvalidRequest

Float64Array: TypeAlias = NDArray[np.float64]

STEPS = 10
# Bootstrap resamples of the prompts for an interval, and the share of them that it covers.
RESAMPLES = 400
COVERED = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval over the prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovery:
    """A ranking's curve, [points] each, with its APGR, its PGR at half of strong, and its CPTs, which are shares."""

    shares: tuple[float, ...]
    pgr: tuple[float, ...]
    apgr: Estimate
    pgr_50: Estimate
    cpt_50: Estimate
    cpt_80: Estimate


def recovery(scores: Float64Array, weak: Float64Array, strong: Float64Array, seed: int = 0) -> Recovery:
    """Measures `scores` [prompts], of which higher ones favour strong, against the qualities [prompts].

    Raises InvalidRequest where the strong route is no better than the weak one, so there is no lead to recover.
    """
    if not strong.mean() > weak.mean():
        raise InvalidRequest("data", f"{strong.mean():.3f}", f"strong must be better than weak's {weak.mean():.3f}")
    shares, pgr = curve(scores, weak, strong)
    resampled = [_figures(*curve(scores[rows], weak[rows], strong[rows])) for rows in _resamples(weak, strong, seed)]
    figures = _figures(shares, pgr)
    columns = zip(figures, zip(*(resampled or [figures]), strict=True), strict=True)
    return Recovery(tuple(shares.tolist()), tuple(pgr.tolist()), *(_estimate(*column) for column in columns))


def apgr_lead(
    scores: Float64Array, others: Float64Array, weak: Float64Array, strong: Float64Array, seed: int = 0
) -> Estimate:
    """Returns the APGR of `scores` minus that of `others`; the interval is over the same resampled prompts."""

    def lead(rows: NDArray[np.int64]) -> float:
        given = weak[rows], strong[rows]
        return apgr(*curve(scores[rows], *given)) - apgr(*curve(others[rows], *given))

    value = lead(np.arange(len(scores)))
    return _estimate(value, [lead(rows) for rows in _resamples(weak, strong, seed)] or [value])


def _estimate(value: float, resampled: Sequence[float]) -> Estimate:
    tail = (1 - COVERED) / 2
    return Estimate(value, *np.quantile(resampled, [tail, 1 - tail]).tolist())


def curve(scores: Float64Array, weak: Float64Array, strong: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Returns (share of strong, PGR), [STEPS + 1] each, with shares that rise from 0 to 1."""
    thresholds = np.quantile(scores, np.linspace(1, 0, STEPS + 1))
    is_strong = scores >= thresholds[:, None]
    is_strong[0] = False
    quality = np.where(is_strong, strong, weak).mean(axis=1)
    return is_strong.mean(axis=1), (quality - weak.mean()) / (strong.mean() - weak.mean())


def apgr(shares: Float64Array, pgr: Float64Array) -> float:
    """Returns the area under the curve."""
    return float(np.trapezoid(pgr, shares))


def cpt(shares: Float64Array, pgr: Float64Array, target: float) -> float:
    """Returns the share of strong at which the curve first reaches a PGR of `target`, 0 < target <= 1."""
    point = int(np.argmax(pgr >= target))
    rise = (target - pgr[point - 1]) / (pgr[point] - pgr[point - 1])
    return float(shares[point - 1] + rise * (shares[point] - shares[point - 1]))


def pgr_at(shares: Float64Array, pgr: Float64Array, share: float) -> float:
    """Returns the PGR at a share of strong."""
    return float(np.interp(share, shares, pgr))


def _figures(shares: Float64Array, pgr: Float64Array) -> list[float]:
    return [apgr(shares, pgr), pgr_at(shares, pgr, 0.5), cpt(shares, pgr, 0.5), cpt(shares, pgr, 0.8)]


def _resamples(weak: Float64Array, strong: Float64Array, seed: int) -> list[NDArray[np.int64]]:
    """Returns the rows of RESAMPLES resamples; one in which strong is no better has no figures and is drawn again."""
    generator = np.random.default_rng(seed)
    found: list[NDArray[np.int64]] = []
    # Where strong hardly leads, twice the draws are a bound, and there are fewer resamples.
    for _ in range(2 * RESAMPLES):
        rows = generator.integers(len(weak), size=len(weak))
        if strong[rows].mean() > weak[rows].mean():
            found.append(rows)
        if len(found) == RESAMPLES:
            break
    return found
