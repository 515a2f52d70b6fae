"""Products of a few rows, compiled by Numba for a processor. Knows arrays, no layer.

Such a product is bound by reading the matrix. The plainest loop, one row of weights behind the other, reads it at the
memory's full speed on one thread, which the kernels that are made for many rows do not.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stitch_server.compiling import compiled

Floats = NDArray[np.float32]


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, with x `[rows, inputs]` and a contiguous weight `[outputs, inputs]`, both float32 or bfloat16."""
    return _sums(x, weight).to(x.dtype)


def multiply_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x · (weight · scales)ᵀ, with contiguous int8 weights `[outputs, inputs]` and float32 scales `[outputs]`.

    Unlike the product for many rows it leaves x as it is, and so is the more exact of both.
    """
    return _sums(x, weight).mul_(scales).to(x.dtype)


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 `[rows, outputs]`."""
    result = torch.empty(x.shape[0], weight.shape[0])
    values = x.float().contiguous().numpy()
    if weight.dtype == torch.bfloat16:
        _multiply_bfloat16(values, weight.view(torch.uint16).numpy(), result.numpy())
    else:
        _multiply(values, weight.numpy(), result.numpy())
    return result


@compiled([f"void(f4[:, ::1], {kind}[:, ::1], f4[:, ::1])" for kind in ("f4", "i1")])
def _multiply(x: Floats, weight: Floats | NDArray[np.int8], result: Floats) -> None:
    for output in range(weight.shape[0]):
        factors = weight[output]
        for row in range(x.shape[0]):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                total += np.float32(factors[place]) * values[place]
            result[row, output] = total


@compiled("void(f4[:, ::1], u2[:, ::1], f4[:, ::1])")
def _multiply_bfloat16(x: Floats, weight: NDArray[np.uint16], result: Floats) -> None:
    for output in range(weight.shape[0]):
        factors = weight[output]
        for row in range(x.shape[0]):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                # A bfloat16 is the upper half of a float32.
                widened = np.uint32(np.uint32(factors[place]) << np.uint32(16))
                total += widened.view(np.float32) * values[place]
            result[row, output] = total
