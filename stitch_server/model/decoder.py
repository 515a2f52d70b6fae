"""A range of one model's decoder layers, whatever its family. Doesn't know where the past is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from stitch.errors import Incompatible
from stitch_server.attention import Attend, Layer, Rotary
from stitch_server.model import hf_layers, llama
from stitch_server.model.adapters import Adapters
from stitch_server.model.description import head_dim, kv_heads, read_config
from stitch_server.model.linear import AS_STORED, WeightFormat
from stitch_server.model.weights import Weights

if TYPE_CHECKING:
    from stitch_server.cpu import PagedKV
    from stitch_server.model.compiled_layers import CompiledLayers

__all__ = ["Attend", "DecoderLayers", "Rotary"]

# Rows, and what they pass beside every layer.
Adapted = Sequence[tuple[slice, Adapters]]


@dataclass(frozen=True)
class DecoderLayers:
    """Layers `first` to `end` (exclusive) of a model, over packed tokens `[tokens, hidden_size]`."""

    first: int
    end: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    _layers: Sequence[Layer]
    _rotary: Callable[[Tensor], Rotary]
    # The same layers for a few tokens; None where their matrices are not kept for these, too.
    _compiled: CompiledLayers | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        first: int,
        end: int,
        device: torch.device,
        dtype: torch.dtype,
        weight_format: WeightFormat = AS_STORED,
    ) -> DecoderLayers:
        """Reads these layers' weights alone.

        Raises Incompatible where the model has no such range, or its layers can't be quantized.
        """
        config = read_config(folder)
        if not 0 <= first < end <= config.num_hidden_layers:
            raise Incompatible(f"layers {first} to {end} are no range of {folder}: it has {config.num_hidden_layers}")
        with Weights(folder, device, dtype, weight_format) as weights:
            layers, rotary, compiled = _of_family(config, first, end, weights)
        return cls(first, end, config.hidden_size, kv_heads(config), head_dim(config), layers, rotary, compiled)

    @property
    def is_lean(self) -> bool:
        """Whether none of them is of `transformers`, which may ask a GPU for its results in the middle of a layer."""
        return all(isinstance(layer, llama.LeanLayer) for layer in self._layers)

    def is_compiled(self, tokens: int) -> bool:
        """Whether a pass of so many tokens, all at the same layers, is one compiled loop."""
        return self._compiled is not None and self._compiled.suits(tokens)

    @property
    def min_efficient_tokens(self) -> int:
        """The number of tokens below which a pass takes hardly less time."""
        return 1 if self._compiled is None else self._compiled.min_efficient_tokens

    @property
    def attention_cost_per_token(self) -> int:
        """The context length at which a token's attention takes about as long as its matmuls.

        A layer's matrices have some 12 · hidden_size² weights; attention takes 2 · hidden_size multiplications a token
        of the context, and each of these takes twice as long.
        """
        return 3 * self.hidden_size

    def rotary(self, positions: Tensor) -> Rotary:
        """What positions `[tokens]` turn queries and keys by; made once for all layers of a batch."""
        return self._rotary(positions)

    def run(
        self,
        hidden: Tensor,
        rotary: Rotary,
        attend: Attend,
        first: int,
        end: int,
        adapted: Adapted = (),
    ) -> Tensor:
        """Takes hidden states `[tokens, hidden_size]` through layers `first` to `end` of its own range.

        Rows that are `adapted` pass their adapters beside every layer.
        """
        return _beside(adapted, partial(self._one_by_one, rotary, attend), hidden, first, end)

    def run_compiled(self, hidden: Tensor, paged: PagedKV, first: int, end: int, adapted: Adapted = ()) -> Tensor:
        """The same where the layers are `is_compiled`: kernels rotate and attend themselves, at the places in `paged`.

        Raises ValueError where they are not kept for kernels.
        """
        if self._compiled is None:
            raise ValueError("these layers are not kept for kernels")
        return _beside(adapted, partial(self._compiled.run, paged), hidden, first, end)

    def _one_by_one(self, rotary: Rotary, attend: Attend, hidden: Tensor, first: int, end: int) -> Tensor:
        for index in range(first, end):
            hidden = self._layers[index - self.first](hidden, rotary, attend)
        return hidden


def _beside(
    adapted: Adapted, through: Callable[[Tensor, int, int], Tensor], hidden: Tensor, first: int, end: int
) -> Tensor:
    """`through` layers `first` to `end`, with what is `adapted` beside each."""
    if not adapted:
        return through(hidden, first, end)
    for index in range(first, end):
        after = through(hidden, index, index + 1)
        for rows, adapters in adapted:
            after[rows] += adapters(index, hidden[rows])
        hidden = after
    return hidden


def _of_family(
    config: PretrainedConfig, first: int, end: int, weights: Weights
) -> tuple[Sequence[Layer], Callable[[Tensor], Rotary], CompiledLayers | None]:
    """Lean layers where there are some, else those of `transformers`."""
    if llama.supports(config):
        rotary = llama.RotaryAngles(config, weights.device)
        layers, compiled = llama.load_layers(config, first, end, weights, rotary)
        return layers, rotary, compiled
    quantization = weights.weight_format.quantization
    if quantization != "none":
        families = ", ".join(llama.FAMILIES)
        raise Incompatible(f"layers of {config.model_type} can't be quantized to {quantization}, only: {families}")
    angles = hf_layers.TransformersAngles(config, weights.device, weights.dtype)
    return hf_layers.load_layers(config, first, end, weights), angles, None
