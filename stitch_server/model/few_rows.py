"""Products of a few rows, by a loop over a copy of the matrix. Doesn't know what a product is for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stitch_server import loops
from stitch_server.arrays import floats, numbers
from stitch_server.loops import Matrix


@dataclass(frozen=True, slots=True)
class RowProduct:
    """The product by a matrix, on one thread."""

    matrix: Matrix

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> RowProduct:
        """A contiguous weight `[outputs, inputs]` of float32, bfloat16 or int8, which is not copied."""
        outputs = weight.shape[0]
        scales = torch.ones(outputs) if scales is None else scales
        bias = torch.zeros(outputs) if bias is None else bias.to(torch.float32, copy=True)
        made = cls(Matrix(numbers(weight), scales.numpy(), bias.numpy()))
        # Compiled here, and not while the first token waits.
        made(torch.zeros(1, weight.shape[1]))
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]` of the same dtype, summed in float32.

        Rows stay as they are: with bytes that is more exact than a product that rounds them, too.
        """
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        loops.multiply(floats(x), self.matrix, result)
        return torch.from_numpy(result).to(x.dtype)
