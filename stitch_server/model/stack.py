"""A shard's lean layers as one compiled loop for a few tokens. Knows no session, and of a cache where tokens lie.

The loop reads a copy of the matrices, row by row; the layers themselves keep them as it suits many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stitch_server.arrays import floats, numbers
from stitch_server.loops.attention import Past
from stitch_server.loops.layers import Layers, run
from stitch_server.loops.numbers import Floats
from stitch_server.loops.products import Matrix
from stitch_server.model.few_rows import are_few
from stitch_server.model.pages import LargePages
from stitch_server.model.product import Keeping, kept_rows

if TYPE_CHECKING:
    from stitch_server.model.lean import LeanLayer


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Decoder layers as loops take them."""

    layers: Layers
    epsilon: float

    def suits(self, hidden: Tensor) -> bool:
        """Whether it is the faster way for these states."""
        return are_few(hidden, self.layers.down.weight)

    def run(self, rotation: Tensor, past: Past, hidden: Tensor, first: int, end: int) -> Tensor:
        """A few tokens' states `[tokens, hidden_size]` behind layers `first` to `end`; keeps their keys and values.

        Queries and keys are turned by `rotation`, complex `[tokens, 1, head_dim / 2]`.
        """
        rows = hidden.to(torch.float32, copy=True).contiguous().numpy()
        turns = rotation.flatten(1).contiguous().numpy()
        run(rows, turns, self.layers, first, end, past, self.epsilon)
        return torch.from_numpy(rows).to(hidden.dtype)


class Stacking:
    """A stack in the making: takes each matrix when it is read, so that the layers are never in memory a third time."""

    def __init__(self, layers: int, keeping: Keeping) -> None:
        self._layers, self._keeping = layers, keeping
        self._pages = LargePages()
        self._weights: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def take(self, index: int, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """The matrix `[outputs, inputs]` of that name in `Layers`, of the layer at `index` of the stack."""
        rows, scales = kept_rows(weight, self._keeping)
        if name not in self._weights:
            self._weights[name] = self._pages.room((self._layers, *rows.shape), rows.dtype)
            self._scales[name] = torch.ones(self._layers, len(rows))
            self._biases[name] = torch.zeros(self._layers, len(rows))
        self._weights[name][index] = rows
        if scales is not None:
            self._scales[name][index] = scales
        if bias is not None:
            self._biases[name][index] = bias

    def stack(self, layers: Sequence[LeanLayer], dtype: torch.dtype) -> LayerStack:
        """Of the layers whose matrices were taken, over a cache of `dtype`; compiled, so that no token waits for it."""
        one = layers[0]
        norms = [
            torch.empty(0, one.head_dim) if layer.query_key_norm is None else layer.query_key_norm for layer in layers
        ]
        stack = LayerStack(
            layers=Layers(
                first=one.index,
                attention_norm=_stacked([layer.attention_norm.weight for layer in layers]),
                query_key_value=self._matrix("query_key_value"),
                query_key_norm=_stacked(norms),
                attention_output=self._matrix("attention_output"),
                feed_forward_norm=_stacked([layer.feed_forward_norm.weight for layer in layers]),
                gate_up=self._matrix("gate_up"),
                down=self._matrix("down"),
                windows=np.array([layer.window or 0 for layer in layers]),
            ),
            epsilon=one.query_key_epsilon,
        )
        pairs = numbers(torch.zeros(len(layers), 1, 2 * one.kv_heads, one.head_dim, dtype=dtype))
        nowhere = Past(one.index, pairs, *(np.array([place]) for place in (0, 0, 1)))
        rotation = torch.ones(1, 1, one.head_dim // 2, dtype=torch.complex64)
        stack.run(rotation, nowhere, torch.zeros(1, len(one.attention_norm.weight)), one.index, one.index + 1)
        return stack

    def _matrix(self, name: str) -> Matrix:
        return Matrix(numbers(self._weights[name]), self._scales[name].numpy(), self._biases[name].numpy())


def _stacked(values: Sequence[Tensor]) -> Floats:
    return floats(torch.stack(list(values)))
