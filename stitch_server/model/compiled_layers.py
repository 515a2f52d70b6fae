"""A shard's lean layers as one call of a compiled kernel. Knows no session, and of a cache where tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stitch_server.cpu import Activations, Floats, Layers, Matrix, PagedKV, Pass, run_layers
from stitch_server.devices import as_bits, as_float32
from stitch_server.huge_pages import HugePageArena
from stitch_server.model.compiled_linear import CompiledLinear, instructions, panels_of, rows_worth_a_product, suits
from stitch_server.model.linear import WeightFormat, packed_rows
from stitch_server.thread_pool import run_on_thread_pool

if TYPE_CHECKING:
    from stitch_server.model.llama import LeanLayer, RotaryAngles


@dataclass(frozen=True, slots=True)
class CompiledLayers:
    """Decoder layers as `kernels.layers` takes them."""

    layers: Layers
    rotary: RotaryAngles
    epsilon: float

    def suits(self, tokens: int) -> bool:
        """Whether it is the faster way for so many tokens."""
        return suits(tokens, self.layers.down.weight)

    @property
    def min_efficient_tokens(self) -> int:
        """The number of tokens below which a pass takes hardly less time."""
        return rows_worth_a_product(self.layers.down.weight)

    def run(self, paged: PagedKV, hidden: Tensor, first: int, end: int) -> Tensor:
        """States `[tokens, hidden_size]` behind layers `first` to `end`; keeps their keys and values."""
        rows = np.array(as_float32(hidden))
        rotations = self.rotary.table(int((paged.ends - paged.begins).max()))
        qkv_width, kv_width = self.layers.query_key_value.bias.shape[1], paged.kv.shape[2] * paged.kv.shape[3]
        widths = (qkv_width, qkv_width - kv_width, self.layers.gate_up.bias.shape[1] // 2)
        activations = Activations(*(np.empty((len(rows), width), np.float32) for width in widths))
        states = Pass(rows, rotations, paged, activations)
        run_on_thread_pool(partial(run_layers, states, self.layers, first, end, self.epsilon, instructions(len(rows))))
        return torch.from_numpy(rows).to(hidden.dtype)


class LayerAssembly:
    """Collects matrices as they are read, so that no layer is in memory twice."""

    def __init__(self, layers: int, weight_format: WeightFormat) -> None:
        self._layers, self._weight_format = layers, weight_format
        self._pages = HugePageArena()
        self._weights: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def take(self, index: int, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Packs the matrix `[outputs, inputs]` of that name in `Layers`, of the layer at `index`."""
        rows, scales = packed_rows(weight, self._weight_format)
        panels = panels_of(rows)
        if name not in self._weights:
            self._weights[name] = self._pages.allocate((self._layers, *panels.shape), panels.dtype)
            self._scales[name] = torch.ones(self._layers, len(rows))
            self._biases[name] = torch.zeros(self._layers, len(rows))
        self._weights[name][index] = panels
        if scales is not None:
            self._scales[name][index] = scales
        if bias is not None:
            self._biases[name][index] = bias

    def linear(self, index: int, name: str) -> CompiledLinear:
        """The linear layer of a matrix that was taken."""
        weight, scales, bias = self._weights[name][index], self._scales[name][index], self._biases[name][index]
        return CompiledLinear(Matrix(as_bits(weight), scales.numpy(), bias.numpy()))

    def compiled(self, layers: Sequence[LeanLayer], rotary: RotaryAngles, dtype: torch.dtype) -> CompiledLayers:
        """The layers whose matrices were taken, over a cache of `dtype`; compiles, so that no token waits for it."""
        one = layers[0]
        norms = [
            torch.empty(0, one.head_dim) if layer.query_key_norm is None else layer.query_key_norm for layer in layers
        ]
        compiled = CompiledLayers(
            layers=Layers(
                first=one.index,
                attention_norm=_stacked_arrays([layer.attention_norm.weight for layer in layers]),
                query_key_value=self._matrix("query_key_value"),
                query_key_norm=_stacked_arrays(norms),
                attention_output=self._matrix("attention_output"),
                feed_forward_norm=_stacked_arrays([layer.feed_forward_norm.weight for layer in layers]),
                gate_up=self._matrix("gate_up"),
                down=self._matrix("down"),
                windows=np.array([layer.window or 0 for layer in layers]),
            ),
            rotary=rotary,
            epsilon=one.query_key_epsilon,
        )
        kv = as_bits(torch.zeros(len(layers), 1, 2 * one.kv_heads, one.head_dim, dtype=dtype))
        nowhere = PagedKV(one.index, kv, *(np.array([place]) for place in (0, 0, 1)))
        compiled.run(nowhere, torch.zeros(1, len(one.attention_norm.weight)), one.index, one.index + 1)
        return compiled

    def _matrix(self, name: str) -> Matrix:
        return Matrix(as_bits(self._weights[name]), self._scales[name].numpy(), self._biases[name].numpy())


def _stacked_arrays(values: Sequence[Tensor]) -> Floats:
    return as_float32(torch.stack(list(values)))
