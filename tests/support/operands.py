"""Rows, a matrix and its bias, to be multiplied."""

from __future__ import annotations

import torch
from torch import Tensor


def operands(rows: int, inputs: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """`[rows, inputs]`, `[53, inputs]` and `[53]`: more outputs than fill whole panels."""
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (53, inputs), (53,)))  # type: ignore[return-value]
