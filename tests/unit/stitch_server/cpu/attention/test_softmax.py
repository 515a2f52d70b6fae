"""The largest of any number of scores is found wherever it stands, and the others become shares of it."""

from __future__ import annotations

import numpy as np
import pytest

from stitch_server.cpu.attention.softmax import exponentiate, largest

# Less than a vector, whole ones, and some behind.
SIZES = [1, 15, 16, 17, 47, 64]


@pytest.mark.parametrize("size", SIZES)
def test_the_largest_is_found_anywhere(size: int) -> None:
    for place in range(size):
        scores = np.full(size, -7, np.float32)
        scores[place] = -3
        assert largest(scores, np.float32(-np.inf)) == -3
        assert largest(scores, np.float32(-1)) == -1


@pytest.mark.parametrize("size", SIZES)
def test_shares_are_powers_and_their_sum_is_given(size: int) -> None:
    scores = np.linspace(-9, 2, size, dtype=np.float32)
    exact = np.exp(scores.astype(np.float64) - 2)
    assert exponentiate(scores, np.float32(2)) == pytest.approx(exact.sum(), rel=1e-6)
    np.testing.assert_allclose(scores, exact, rtol=1e-6)
