"""The two passes of the softmax against NumPy, for rows of any length."""

from __future__ import annotations

import numpy as np
import pytest

from stitch_server.cpu.attention.softmax import exponentiate, largest

pytestmark = pytest.mark.slow

# Less than a vector, whole vectors, and vectors with a remainder.
SIZES = [1, 15, 16, 17, 47, 64]


@pytest.mark.parametrize("size", SIZES)
def test_largest_finds_the_maximum_at_any_index(size: int) -> None:
    for index in range(size):
        scores = np.full(size, -7, np.float32)
        scores[index] = -3
        assert largest(scores, np.float32(-np.inf)) == -3
        assert largest(scores, np.float32(-1)) == -1


@pytest.mark.parametrize("size", SIZES)
def test_exponentiate_returns_the_sum_of_the_powers(size: int) -> None:
    scores = np.linspace(-9, 2, size, dtype=np.float32)
    exact = np.exp(scores.astype(np.float64) - 2)
    assert exponentiate(scores, np.float32(2)) == pytest.approx(exact.sum(), rel=1e-6)
    np.testing.assert_allclose(scores, exact, rtol=1e-6)
