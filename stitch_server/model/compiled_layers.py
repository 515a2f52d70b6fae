"""A shard's native layers as one call of the CPU kernels (`stitch_server/cpu/layers.py`).

`LayerAssembly` packs the layers' matrices into arrays with a leading axis for the layer, as they are read.
`CompiledLayers` takes a batch's hidden states through a range of them, over the KV cache that `PagedKV` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stitch_server.cpu import Activations, Floats, Layers, Matrix, PagedKV, Pass, RowAdapters, run_layers
from stitch_server.devices import HugePageArena, as_bits, as_float32, run_on_thread_pool
from stitch_server.model.adapters import EPSILON, Adapters
from stitch_server.model.compiled_linear import (
    CompiledLinear,
    instructions_for,
    is_faster_for,
    min_efficient_tokens,
    pack_panels,
)
from stitch_server.model.llama import NativeLayer, RotaryAngles
from stitch_server.model.quantized import quantize
from stitch_server.model.weights import WeightFormat

# Takes float32 states `[tokens, hidden_size]` through layers `first` to `end`, in place, and returns them.
RunLayers = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class CompiledLayers:
    """Decoder layers in the arrays that the kernels read."""

    layers: Layers
    rotary: RotaryAngles
    epsilon: float

    def is_faster_for(self, tokens: int) -> bool:
        """Whether a pass of this many tokens is faster here than layer by layer through oneDNN."""
        return is_faster_for(tokens, self.layers.down.weight)

    @property
    def min_efficient_tokens(self) -> int:
        """The number of tokens below which a pass takes hardly less time."""
        return min_efficient_tokens(self.layers.down.weight)

    def pass_over(self, paged_kv: PagedKV, adapted: tuple[slice, Adapters] | None = None) -> RunLayers:
        """Returns a function that takes a batch through layers and caches its keys and values; calls share buffers.

        Some rows may be adapted beside every layer.
        """
        tokens = len(paged_kv.ends)
        rotations = self.rotary.table(int((paged_kv.ends - paged_kv.begins).max()))
        qkv_width, kv_width = self.layers.query_key_value.bias.shape[1], paged_kv.kv.shape[2] * paged_kv.kv.shape[3]
        widths = (qkv_width, qkv_width - kv_width, self.layers.gate_up.bias.shape[1] // 2)
        activations = Activations(*(np.empty((tokens, width), np.float32) for width in widths))
        adapters, instructions = _row_adapters(adapted), instructions_for(tokens)

        def run(states: Tensor, first: int, end: int) -> Tensor:
            batch = Pass(states.numpy(), rotations, paged_kv, activations, adapters)
            run_on_thread_pool(partial(run_layers, batch, self.layers, first, end, self.epsilon, instructions))
            return states

        return run


def _row_adapters(adapted: tuple[slice, Adapters] | None) -> RowAdapters:
    if adapted is None:
        none = np.empty((0, 0, 0), np.float32)
        return RowAdapters(0, 0, none, none, np.empty((0, 0), np.float32), EPSILON)
    rows, adapters = adapted
    narrow = np.empty((rows.stop - rows.start, adapters.rank), np.float32)
    return RowAdapters(rows.start, adapters.first, *adapters.as_read_by_kernels, narrow, EPSILON)


class LayerAssembly:
    """Collects matrices as they are read, so that no layer is in memory twice."""

    def __init__(self, layers: int, weight_format: WeightFormat) -> None:
        self._layers, self._weight_format = layers, weight_format
        self._arena = HugePageArena()
        self._weights: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def add(self, index: int, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Packs the matrix `[outputs, inputs]` with that name in `Layers`, of the layer at `index`."""
        quantized, scales = quantize(weight, self._weight_format)
        panels = pack_panels(quantized)
        if name not in self._weights:
            self._weights[name] = self._arena.allocate((self._layers, *panels.shape), panels.dtype)
            self._scales[name] = torch.ones(self._layers, len(weight))
            self._biases[name] = torch.zeros(self._layers, len(weight))
        self._weights[name][index] = panels
        if scales is not None:
            self._scales[name][index] = scales
        if bias is not None:
            self._biases[name][index] = bias

    def linear(self, index: int, name: str) -> CompiledLinear:
        """Returns the linear layer of a matrix that was added."""
        weight, scales, bias = self._weights[name][index], self._scales[name][index], self._biases[name][index]
        return CompiledLinear(Matrix(as_bits(weight), scales.numpy(), bias.numpy()))

    def finish(self, layers: Sequence[NativeLayer], rotary: RotaryAngles, dtype: torch.dtype) -> CompiledLayers:
        """Returns the layers whose matrices were added, compiled for a cache of `dtype`."""
        one = layers[0]
        norms = [
            torch.empty(0, one.head_dim) if layer.query_key_norm is None else layer.query_key_norm for layer in layers
        ]
        compiled = CompiledLayers(
            layers=Layers(
                first=one.index,
                attention_norm=_stack([layer.attention_norm.weight for layer in layers]),
                query_key_value=self._matrix("query_key_value"),
                query_key_norm=_stack(norms),
                attention_output=self._matrix("attention_output"),
                feed_forward_norm=_stack([layer.feed_forward_norm.weight for layer in layers]),
                gate_up=self._matrix("gate_up"),
                down=self._matrix("down"),
                windows=np.array([layer.window or 0 for layer in layers]),
            ),
            rotary=rotary,
            epsilon=one.query_key_epsilon,
        )
        # Compiles the kernel now, over a cache of one token, so that the first token doesn't wait for the compiler.
        kv = as_bits(torch.zeros(len(layers), 1, 2 * one.kv_heads, one.head_dim, dtype=dtype))
        one_token = PagedKV(one.index, kv, *(np.array([index]) for index in (0, 0, 1)))
        compiled.pass_over(one_token)(torch.zeros(1, len(one.attention_norm.weight)), one.index, one.index + 1)
        return compiled

    def _matrix(self, name: str) -> Matrix:
        return Matrix(as_bits(self._weights[name]), self._scales[name].numpy(), self._biases[name].numpy())


def _stack(values: Sequence[Tensor]) -> Floats:
    return as_float32(torch.stack(list(values)))
