"""Means over sequences or prompts with 95 % intervals, and their differences over the same ones.

Tokens of one sequence are not independent, so whole sequences are resampled (percentile bootstrap). Quantities that
were measured on the same sequences are resampled together, so the interval of a difference is a paired one: it says
nothing of how much the sequences differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 1000
_QUANTILES = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False)
class Sample:
    """Sums of a quantity, and the number of its values, over each unit that is resampled as a whole."""

    # Both [units], float64.
    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sample:
        """Takes one value `[units]` of each unit."""
        return cls(values.double(), torch.ones(len(values), dtype=torch.float64))

    @classmethod
    def of_tokens(cls, values: Tensor, counted: Tensor) -> Sample:
        """Takes the `counted` of the values `[sequences, tokens]`."""
        return cls((values.double() * counted).sum(1), counted.sum(1).double())

    def mean(self) -> float:
        """Returns the mean over all values; nan where there is none."""
        return float(self.sums.sum() / self.counts.sum())

    def resampled(self) -> Tensor:
        """Returns the means of RESAMPLES draws of as many units; the draws are those of every sample of this size."""
        picks = _picks(len(self.sums))
        return self.sums[picks].sum(1) / self.counts[picks].sum(1)

    def interval(self) -> Interval:
        """Returns the mean with its interval."""
        return interval_of(lambda means: means["one"], {"one": self})


def interval_of(figure: Callable[[Mapping[str, Tensor]], Tensor], samples: Mapping[str, Sample]) -> Interval:
    """Returns the interval of a figure of several means, which are over the same units.

    `figure` takes the means by name, each of any one shape, and returns the figure in that shape.
    """
    found = figure({name: torch.tensor(sample.mean(), dtype=torch.float64) for name, sample in samples.items()})
    drawn = figure({name: sample.resampled() for name, sample in samples.items()})
    # A draw may have no value of a rare kind.
    low, high = torch.nanquantile(drawn, _QUANTILES).tolist()
    return Interval(float(found), low, high)


def difference(one: Sample, other: Sample) -> Interval:
    """Returns the paired interval of the mean of `one` minus that of `other`, over the same units."""
    return interval_of(lambda means: means["one"] - means["other"], {"one": one, "other": other})


@lru_cache(maxsize=8)
def _picks(units: int) -> Tensor:
    return torch.randint(units, (RESAMPLES, units), generator=torch.Generator().manual_seed(0))
