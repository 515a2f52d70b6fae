"""Products of a few rows, by a loop over a copy of the matrix. Doesn't know what a product is for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stitch_server.arrays import floats, numbers
from stitch_server.loops.numbers import Numbers
from stitch_server.loops.products import Matrix, multiply

# For more rows a library is faster than loops, for which tiles need the registers of AVX-512. For weights that are not
# float32 processors have instructions which a library uses and loops don't.
FEW_ROWS = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
FEW_ROWS_OF_NARROW_WEIGHTS = 16


def are_few(rows: Tensor, weight: Numbers) -> bool:
    """Whether loops are the faster way for these rows: they are few, and on one thread. Loops have no gradient."""
    most = FEW_ROWS if weight.dtype == np.float32 else FEW_ROWS_OF_NARROW_WEIGHTS
    return rows.shape[0] <= most and torch.get_num_threads() == 1 and not rows.requires_grad


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

    def suits(self, x: Tensor) -> bool:
        """Whether it is the faster way for these rows."""
        return are_few(x, self.matrix.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]` of the same dtype, summed in float32.

        Rows stay as they are: with bytes that is more exact than a product that rounds them, too.
        """
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        multiply(floats(x), self.matrix, result)
        return torch.from_numpy(result).to(x.dtype)
