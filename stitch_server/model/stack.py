"""A shard's lean layers as one compiled loop. Knows no session, and of a cache where tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stitch_server.arrays import floats, numbers
from stitch_server.crew import together
from stitch_server.loops.layers import Layers, Pass, Room, run
from stitch_server.loops.matrix import Matrix
from stitch_server.loops.numbers import Floats
from stitch_server.loops.past import Past
from stitch_server.model.looped import LoopProduct, instructions, panels_of, rows_worth_a_product, suits
from stitch_server.model.product import Keeping, kept_rows
from stitch_server.pages import LargePages

if TYPE_CHECKING:
    from stitch_server.model.lean import LeanLayer, RotaryAngles


@dataclass(frozen=True, slots=True)
class LayerStack:
    """Decoder layers as loops take them."""

    layers: Layers
    rotary: RotaryAngles
    epsilon: float

    def suits(self, tokens: int) -> bool:
        """Whether it is the faster way for so many tokens."""
        return suits(tokens, self.layers.down.weight)

    @property
    def tokens_worth_a_pass(self) -> int:
        """Passes over fewer take hardly less time."""
        return rows_worth_a_product(self.layers.down.weight)

    def run(self, past: Past, hidden: Tensor, first: int, end: int) -> Tensor:
        """States `[tokens, hidden_size]` behind layers `first` to `end`; keeps their keys and values."""
        rows = np.array(floats(hidden))
        turns = self.rotary.table(int((past.ends - past.begins).max()))
        asked, kept = self.layers.query_key_value.bias.shape[1], past.pairs.shape[2] * past.pairs.shape[3]
        widths = (asked, asked - kept, self.layers.gate_up.bias.shape[1] // 2)
        room = Room(*(np.empty((len(rows), width), np.float32) for width in widths))
        states = Pass(rows, turns, past, room)
        together(partial(run, states, self.layers, first, end, self.epsilon, instructions(len(rows))))
        return torch.from_numpy(rows).to(hidden.dtype)


class Stacking:
    """A stack in the making: takes each matrix when it is read, so that layers are never in memory once more."""

    def __init__(self, layers: int, keeping: Keeping) -> None:
        self._layers, self._keeping = layers, keeping
        self._pages = LargePages()
        self._weights: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def take(self, index: int, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """The matrix `[outputs, inputs]` of that name in `Layers`, of the layer at `index` of the stack."""
        rows, scales = kept_rows(weight, self._keeping)
        panels = panels_of(rows)
        if name not in self._weights:
            self._weights[name] = self._pages.room((self._layers, *panels.shape), panels.dtype)
            self._scales[name] = torch.ones(self._layers, len(rows))
            self._biases[name] = torch.zeros(self._layers, len(rows))
        self._weights[name][index] = panels
        if scales is not None:
            self._scales[name][index] = scales
        if bias is not None:
            self._biases[name][index] = bias

    def product(self, index: int, name: str) -> LoopProduct:
        """By a matrix that was taken."""
        weight, scales, bias = self._weights[name][index], self._scales[name][index], self._biases[name][index]
        return LoopProduct(Matrix(numbers(weight), scales.numpy(), bias.numpy()))

    def stack(self, layers: Sequence[LeanLayer], rotary: RotaryAngles, dtype: torch.dtype) -> LayerStack:
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
            rotary=rotary,
            epsilon=one.query_key_epsilon,
        )
        pairs = numbers(torch.zeros(len(layers), 1, 2 * one.kv_heads, one.head_dim, dtype=dtype))
        nowhere = Past(one.index, pairs, *(np.array([place]) for place in (0, 0, 1)))
        stack.run(nowhere, torch.zeros(1, len(one.attention_norm.weight)), one.index, one.index + 1)
        return stack

    def _matrix(self, name: str) -> Matrix:
        return Matrix(numbers(self._weights[name]), self._scales[name].numpy(), self._biases[name].numpy())


def _stacked(values: Sequence[Tensor]) -> Floats:
    return floats(torch.stack(list(values)))
