"""Intervals of means and of paired differences."""

from __future__ import annotations

from math import isnan

import pytest
import torch

from stitch_training.intervals import RESAMPLES, Sample, difference, interval_of


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


def test_interval_covers_the_mean_and_narrows_with_units() -> None:
    few, many = (Sample.of(3 + drawn(count)).interval() for count in (10, 1000))
    for interval in (few, many):
        assert interval.low < interval.mean < interval.high
    # 2 x 1.96 standard errors of a thousand values of unit variance.
    assert many.high - many.low == pytest.approx(3.92 / 1000**0.5, rel=0.15)
    assert few.high - few.low > 5 * (many.high - many.low)


def test_interval_of_equal_values_is_empty() -> None:
    interval = Sample.of(torch.full((9,), 2.5)).interval()
    assert (interval.low, interval.mean, interval.high) == pytest.approx((2.5, 2.5, 2.5))


def test_mean_weighs_tokens_and_not_sequences() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [7.0, 9.0, 9.0]])
    sample = Sample.of_tokens(values, torch.tensor([[True, True, True], [True, False, False]]))
    assert sample.mean() == pytest.approx(2.5)


def test_paired_difference_is_far_narrower_than_the_means() -> None:
    level = 10 * drawn(200)
    one, other = Sample.of(level + 0.1), Sample.of(level + 0.01 * drawn(200, seed=1))
    found = difference(one, other)
    assert found.mean == pytest.approx(0.1, abs=0.003)
    assert 0.09 < found.low < found.mean < found.high < 0.11
    assert found.excludes_zero()
    assert one.interval().high - one.interval().low > 1


def test_difference_of_equal_samples_is_zero() -> None:
    sample = Sample.of(drawn(20))
    found = difference(sample, sample)
    assert (found.low, found.mean, found.high) == (0, 0, 0)
    assert not found.excludes_zero()


def test_figure_of_several_means_has_an_interval() -> None:
    samples = {"a": Sample.of(4 + drawn(500)), "b": Sample.of(2 + drawn(500, seed=1))}
    found = interval_of(lambda means: means["a"] / means["b"], samples)
    assert found.mean == pytest.approx(2, abs=0.2)
    assert found.low < found.mean < found.high


def test_draws_without_a_value_are_left_out() -> None:
    rare = Sample(torch.tensor([3.0, 0.0, 0.0]).double(), torch.tensor([1.0, 0.0, 0.0]).double())
    assert 0 < int(rare.resampled().isnan().sum()) < RESAMPLES
    assert (rare.interval().low, rare.interval().high) == (3.0, 3.0)
    none = Sample(torch.zeros(3).double(), torch.zeros(3).double())
    assert isnan(none.interval().mean)
