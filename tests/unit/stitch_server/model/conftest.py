"""Fixtures for tests of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def _three_threads() -> Iterator[None]:
    """Shares the work of every kernel among three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
