"""Random operands for tests of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_operands(tokens: int, inputs: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs `[tokens, inputs]`, a weight `[53, inputs]` and a bias `[53]`; 53 leaves the last panel padded."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((tokens, inputs), (53, inputs), (53,)))  # type: ignore[return-value]
