"""Products of a few rows, and lean layers made of them, compiled by Numba for a processor. Knows no session, no cache.

Such a product is bound by reading the matrix. The plainest loop, one row of weights behind the other, reads it at the
memory's full speed on one thread, which the kernels that are made for many rows do not. Between its products a layer
does so little arithmetic that calling a library for each step of it costs more than the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from stitch_server.compiling import compiled

# For more rows the products of a library are faster.
FEW_ROWS = 4

Floats = NDArray[np.float32]


class Matrix(NamedTuple):
    """x → x · (weight · scale)ᵀ + bias, as loops read it."""

    # [outputs, inputs]: float32, the bits of bfloat16, or int8
    weight: NDArray[Any]
    # [outputs], both
    scales: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class RowProduct:
    """The product by a matrix for at most FEW_ROWS rows, on one thread."""

    matrix: Matrix

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> RowProduct:
        """A contiguous weight `[outputs, inputs]` of float32, bfloat16 or int8, which is not copied."""
        outputs = weight.shape[0]
        bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        scales = torch.ones(outputs) if scales is None else scales
        bias = torch.zeros(outputs) if bias is None else bias.to(torch.float32, copy=True)
        made = cls(Matrix(bits.numpy(), scales.numpy(), bias.numpy()))
        # Compiled here, and not while the first token waits.
        made(torch.zeros(1, weight.shape[1]))
        return made

    def suits(self, x: Tensor) -> bool:
        """Whether x has few rows, there is one thread, and no gradient is wanted."""
        return x.shape[0] <= FEW_ROWS and torch.get_num_threads() == 1 and not x.requires_grad

    def __call__(self, x: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]` of the same dtype, summed in float32.

        Rows stay as they are: with bytes that is more exact than a product that rounds them, too.
        """
        result = np.empty((x.shape[0], len(self.matrix.bias)), np.float32)
        _multiply(_array(x), self.matrix, result)
        return torch.from_numpy(result).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerLoops:
    """What a `lean.LeanLayer` computes on either side of attention, for few tokens."""

    query_key_value: RowProduct
    attention_output: RowProduct
    gate_up: RowProduct
    down: RowProduct
    # [hidden_size], both
    attention_norm: Floats
    feed_forward_norm: Floats
    # Queries' heads and keys'.
    rotated: int
    # [rotated, head_dim]; [0, head_dim] where the family has none.
    query_key_norm: Floats
    epsilon: float

    def __post_init__(self) -> None:
        # Compiled here, and not while the first token waits.
        hidden, inputs = torch.zeros(1, len(self.attention_norm)), self.attention_output.matrix.weight.shape[1]
        self.before(hidden, torch.ones(1, 1, self.query_key_norm.shape[1] // 2, dtype=torch.complex64))
        self.behind(torch.zeros(1, inputs), hidden)

    def suits(self, hidden: Tensor) -> bool:
        """Whether these states `[tokens, hidden_size]` are few."""
        return self.query_key_value.suits(hidden)

    def before(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        """The layer's input `[tokens, hidden_size]` to queries, keys and values, side by side.

        Queries and keys are turned by `rotation`, complex `[tokens, 1, head_dim / 2]`.
        """
        mixed = np.empty((hidden.shape[0], len(self.query_key_value.matrix.bias)), np.float32)
        _before_attention(
            _array(hidden),
            self.attention_norm,
            self.epsilon,
            self.query_key_value.matrix,
            self.rotated,
            self.query_key_norm,
            rotation.flatten(1).contiguous().numpy(),
            mixed,
        )
        return torch.from_numpy(mixed).to(hidden.dtype)

    def behind(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """What attention gave, `[tokens, heads * head_dim]`, and the layer's input to its output."""
        after = np.empty(hidden.shape, np.float32)
        _behind_attention(
            _array(attended),
            _array(hidden),
            self.attention_output.matrix,
            self.feed_forward_norm,
            self.epsilon,
            self.gate_up.matrix,
            self.down.matrix,
            after,
        )
        return torch.from_numpy(after).to(hidden.dtype)


def _array(rows: Tensor) -> Floats:
    array: Floats = rows.float().contiguous().numpy()
    return array


def _widened(weight: Any) -> Any:
    """A weight as float32; only compiled."""
    raise NotImplementedError


@overload(_widened, strict=False)
def _widened_by_kind(weight: Any) -> Callable[[Any], Any]:
    if weight == types.uint16:
        # A bfloat16 is the upper half of a float32.
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: np.float32(weight)


@compiled()
def _multiply(x: Floats, matrix: Matrix, result: Floats) -> None:
    for output in range(len(matrix.weight)):
        factors = matrix.weight[output]
        for row in range(len(x)):
            values = x[row]
            total = np.float32(0)
            for place in range(factors.size):
                total += _widened(factors[place]) * values[place]
            result[row, output] = total * matrix.scales[output] + matrix.bias[output]


@compiled()
def _normalize(values: Floats, gains: Floats, epsilon: float) -> None:
    """Divides by the root mean square, in place."""
    total = np.float32(0)
    for value in values:
        total += value * value
    inverse = np.float32(1) / np.sqrt(total / np.float32(values.size) + np.float32(epsilon))
    for place in range(values.size):
        values[place] *= inverse * gains[place]


@compiled()
def _turn(head: Floats, turns: NDArray[np.complex64]) -> None:
    """Rotates neighbouring pairs, in place."""
    for pair in range(turns.size):
        real, imaginary, turn = head[2 * pair], head[2 * pair + 1], turns[pair]
        head[2 * pair] = real * turn.real - imaginary * turn.imag
        head[2 * pair + 1] = real * turn.imag + imaginary * turn.real


@compiled()
def _before_attention(
    hidden: Floats,
    norm: Floats,
    epsilon: float,
    query_key_value: Matrix,
    rotated: int,
    head_norm: Floats,
    turns: NDArray[np.complex64],
    mixed: Floats,
) -> None:
    normed = hidden.copy()
    for token in range(len(hidden)):
        _normalize(normed[token], norm, epsilon)
    _multiply(normed, query_key_value, mixed)
    width = 2 * turns.shape[1]
    for token in range(len(hidden)):
        for number in range(rotated):
            head = mixed[token, number * width : (number + 1) * width]
            if len(head_norm):
                _normalize(head, head_norm[number], epsilon)
            _turn(head, turns[token])


@compiled()
def _behind_attention(
    attended: Floats,
    hidden: Floats,
    attention_output: Matrix,
    norm: Floats,
    epsilon: float,
    gate_up: Matrix,
    down: Matrix,
    after: Floats,
) -> None:
    middle = np.empty_like(hidden)
    _multiply(attended, attention_output, middle)
    middle += hidden
    normed = middle.copy()
    for token in range(len(hidden)):
        _normalize(normed[token], norm, epsilon)
    both = np.empty((len(hidden), len(gate_up.weight)), np.float32)
    _multiply(normed, gate_up, both)
    width = both.shape[1] // 2
    gated = np.empty((len(hidden), width), np.float32)
    for token in range(len(hidden)):
        for place in range(width):
            gate = both[token, place]
            gated[token, place] = gate / (np.float32(1) + np.exp(-gate)) * both[token, width + place]
    _multiply(gated, down, after)
    after += middle
