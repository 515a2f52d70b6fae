"""Operands of a linear layer: inputs, a weight and its bias."""

from __future__ import annotations

import torch
from torch import Tensor


def operands(tokens: int, inputs: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `[tokens, inputs]`, `[53, inputs]` and `[53]`: the last panel of outputs is padded."""
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((tokens, inputs), (53, inputs), (53,)))  # type: ignore[return-value]
