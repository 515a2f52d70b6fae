"""Hidden states times a weight matrix: where almost all of the time goes. Doesn't know what the product is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """x → x · weightᵀ + bias, with weight `[outputs, inputs]` and bias `[outputs]`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, inputs]` to a new tensor `[tokens, outputs]`."""
        return F.linear(x, self.weight, self.bias)
