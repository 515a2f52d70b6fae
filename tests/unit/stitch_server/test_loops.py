"""Numbers that loops read and write are PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stitch_server import loops
from stitch_server.arrays import numbers

# Among them what lies half-way between two bfloat16, what rounds up to infinity, and what a float32 can hardly hold.
VALUES = torch.tensor(
    [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, 1e-40, float("inf"), -float("inf")]
)


def kept(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """One token's key and value, as they come out of the cache."""
    loops.keep(values.view(1, 2, -1).numpy(), 0, numbers(pairs), np.array([3, 1]), np.array([0, 2]))
    return pairs[1].flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_rounded_as_pytorch_does(dtype: torch.dtype) -> None:
    values = torch.cat([VALUES, -VALUES, torch.randn(4096, generator=torch.Generator().manual_seed(0))])
    pairs = torch.full((4, 2, len(values) // 2), 7.0, dtype=dtype)
    assert torch.equal(kept(values, pairs), values.to(dtype))
    assert bool((pairs[[0, 2, 3]] == 7.0).all())


def test_what_is_no_number_stays_none() -> None:
    # Rounding up all bits of a float32 would make a zero of the first.
    values = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(kept(values, torch.zeros(4, 2, 2, dtype=torch.bfloat16)).isnan().all())
