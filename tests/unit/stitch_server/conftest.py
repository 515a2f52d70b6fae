"""What holds for all tests of a shard. Knows no test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whichever tests ran before."""
    torch.manual_seed(0)
