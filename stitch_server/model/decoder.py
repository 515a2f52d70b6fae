"""A range of one model's decoder layers, of any supported family: `[tokens, hidden_size]` in and out.

Layers reach the KV cache through the `attend` function that they are given. The native layers of `llama.py` are used
for the families that they support, those of `transformers` for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stitch.errors import Incompatible
from stitch_server.attention import Attend, Layer, Rotary
from stitch_server.model import hf_layers, llama, llama_loader
from stitch_server.model.adapters import Adapters
from stitch_server.model.description import Config, check_tensors, head_dim, kv_heads, read_config
from stitch_server.model.ffn_skip import Skipping, run_layer
from stitch_server.model.llama_config import FAMILIES, LlamaConfig
from stitch_server.model.weights import AS_STORED, WeightFormat, Weights

if TYPE_CHECKING:
    from stitch_server.cpu import PagedKV
    from stitch_server.model.compiled_layers import CompiledLayers

# Slices of a batch's tokens, and the adapters that each passes beside every layer.
Adapted = Sequence[tuple[slice, Adapters]]
# In larger batches PyTorch's matmuls for adapters save more than a call of the CPU kernels for each layer costs.
MAX_ADAPTED_TOKENS = 32


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
    # The same layers packed for the CPU kernels; None where these are not used.
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
        """Reads the weights of these layers only.

        Raises Incompatible if the model has no such range, its tensors aren't those that its config.json describes, or
        its layers can't be quantized.
        """
        config = read_config(folder)
        if not 0 <= first < end <= config.num_hidden_layers:
            raise Incompatible(f"layers {first} to {end} are no range of {folder}: it has {config.num_hidden_layers}")
        with Weights(folder, device, dtype, weight_format) as weights:
            check_tensors(folder, config)
            layers, rotary, compiled = _load_family(config, first, end, weights)
        return cls(first, end, config.hidden_size, kv_heads(config), head_dim(config), layers, rotary, compiled)

    @property
    def is_native(self) -> bool:
        """Whether all layers are native; one of `transformers` may synchronize with a GPU in the middle of a layer."""
        return all(isinstance(layer, llama.NativeLayer) for layer in self._layers)

    def is_compiled(self, tokens: int) -> bool:
        """Whether a pass of this many tokens, all through the same layers, is one call of the CPU kernels."""
        return self._compiled is not None and self._compiled.is_faster_for(tokens)

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

    def layer(self, index: int) -> Layer:
        """Returns a layer by its index in the whole model."""
        return self._layers[index - self.first]

    def rotary(self, positions: Tensor) -> Rotary:
        """Returns the rotations of positions `[tokens]`, computed once for all layers of a batch."""
        return self._rotary(positions)

    def run(
        self,
        hidden: Tensor,
        rotary: Rotary,
        attend: Attend,
        first: int,
        end: int,
        adapted: Adapted = (),
        skipping: Skipping = (),
    ) -> Tensor:
        """Takes hidden states `[tokens, hidden_size]` through layers `first` to `end` of its own range.

        Tokens that are `adapted` pass their adapters beside every layer, and rows that are `skipping` leave out the
        feed-forward networks whose gates open. These layers must be native.
        """
        return _run_adapted(adapted, partial(self._run_layers, rotary, attend, skipping), hidden, first, end)

    def run_compiled(self, hidden: Tensor, paged_kv: PagedKV, first: int, end: int, adapted: Adapted = ()) -> Tensor:
        """Does the same in the CPU kernels, which rotate and attend themselves, over the slots in `paged_kv`.

        Raises ValueError if the layers are not packed for the kernels.
        """
        if self._compiled is None:
            raise ValueError("these layers are not packed for the CPU kernels")
        states = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if len(adapted) == 1 and len(states) <= MAX_ADAPTED_TOKENS:
            return self._compiled.pass_over(paged_kv, adapted[0])(states, first, end).to(hidden.dtype)
        return _run_adapted(adapted, self._compiled.pass_over(paged_kv), states, first, end).to(hidden.dtype)

    def _run_layers(
        self, rotary: Rotary, attend: Attend, skipping: Skipping, hidden: Tensor, first: int, end: int
    ) -> Tensor:
        for index in range(first, end):
            layer = self._layers[index - self.first]
            gated = [(rows, skip) for rows, skip in skipping if skip.first <= index < skip.end]
            if gated and isinstance(layer, llama.NativeLayer):
                hidden = run_layer(layer, hidden, rotary, attend, gated)
            else:
                hidden = layer(hidden, rotary, attend)
        return hidden


def _run_adapted(
    adapted: Adapted, run: Callable[[Tensor, int, int], Tensor], hidden: Tensor, first: int, end: int
) -> Tensor:
    """Runs layers `first` to `end`, one at a time if there are adapters to add to each layer's output.

    `run` may change its input, which it returns then.
    """
    if not adapted:
        return run(hidden, first, end)
    for index in range(first, end):
        added = [adapters(index, hidden[tokens]) for tokens, adapters in adapted]
        hidden = run(hidden, index, index + 1)
        for (tokens, _), beside in zip(adapted, added, strict=True):
            hidden[tokens] += beside
    return hidden


def _load_family(
    config: Config, first: int, end: int, weights: Weights
) -> tuple[Sequence[Layer], Callable[[Tensor], Rotary], CompiledLayers | None]:
    """Reads native layers if they support the model, else those of `transformers`."""
    if isinstance(config, LlamaConfig):
        rotary = llama.RotaryAngles(config, weights.device)
        layers, compiled = llama_loader.load_layers(config, first, end, weights, rotary)
        return layers, rotary, compiled
    quantization = weights.weight_format.quantization
    if quantization != "none":
        kind = f"{config.model_type} with hidden_act {config.hidden_act}"
        families = ", ".join(FAMILIES)
        raise Incompatible(f"layers of {kind} can't be quantized to {quantization}, only with silu: {families}")
    angles = hf_layers.TransformersAngles(config, weights.device, weights.dtype)
    return hf_layers.load_layers(config, first, end, weights), angles, None
