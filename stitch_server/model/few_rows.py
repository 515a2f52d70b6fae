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
    result = torch.empty(x.shape[0], weight.shape[0])
    values = x.float().contiguous().numpy()
    if weight.dtype == torch.bfloat16:
        _multiply_bfloat16(values, weight.view(torch.uint16).numpy(), result.numpy())
    else:
        _multiply_float32(values, weight.numpy(), result.numpy())
    return result.to(x.dtype)


def multiply_int8(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x · (weight · scales)ᵀ, with contiguous int8 weights `[outputs, inputs]` and float32 scales `[outputs]`.

    Unlike the product for many rows it leaves x as it is, and so is the more exact of both.
    """
    result = torch.empty(x.shape[0], weight.shape[0])
    _multiply_int8(x.float().contiguous().numpy(), weight.numpy(), scales.numpy(), result.numpy())
    return result.to(x.dtype)


@compiled("void(f4[:, ::1], f4[:, ::1], f4[:, ::1])")
def _multiply_float32(x: Floats, weight: Floats, result: Floats) -> None:
    for output in range(weight.shape[0]):
        factors = weight[output]
        for row in range(x.shape[0]):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                total += factors[place] * values[place]
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


@compiled("void(f4[:, ::1], i1[:, ::1], f4[::1], f4[:, ::1])")
def _multiply_int8(x: Floats, weight: NDArray[np.int8], scales: Floats, result: Floats) -> None:
    for output in range(weight.shape[0]):
        factors = weight[output]
        for row in range(x.shape[0]):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                total += np.float32(factors[place]) * values[place]
            result[row, output] = total * scales[output]
