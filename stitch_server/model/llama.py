"""Decoder layers with as few operations as the arithmetic allows. Knows the families in `FAMILIES` and no other.

Queries, keys and values come from one product, gate and up from another. The rows of queries and keys are stored
in another order than in the file, so that the two values that a rotation mixes are neighbours and the whole
rotation is one complex multiplication in place; attention doesn't notice, since both are permuted alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from stitch_server.attention import Attend, Rotary
from stitch_server.model.description import head_dim, kv_heads
from stitch_server.model.linear import Linear, linear
from stitch_server.model.weights import Weights

if TYPE_CHECKING:
    from stitch_server.model.compiled_layers import CompiledLayers

# Given a matrix under its name in `kernels.layers.Layers`, `[outputs, inputs]`, and its bias: the product by it.
LinearOf = Callable[[str, Tensor, Tensor | None], Linear]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
# Scalings whose angles depend on the position alone, never on the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# That a table of rotations begins with.
FEWEST_POSITIONS = 4096


def supports(config: PretrainedConfig) -> bool:
    """Whether these layers compute what the model's own would."""
    rope_type = config.rope_parameters["rope_type"]
    return config.model_type in FAMILIES and config.hidden_act == "silu" and rope_type in ROPE_TYPES


class RotaryAngles:
    """The rotations of the model's positions, with the scaling that its configuration asks for."""

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        embedding = LlamaRotaryEmbedding(cast(LlamaConfig, config))
        self._frequencies = embedding.inv_freq.to(device, torch.float32)
        self._radius = torch.tensor(float(embedding.attention_scaling), device=device)
        self._table = np.empty((0, len(self._frequencies)), np.complex64)

    def __call__(self, positions: Tensor) -> Rotary:
        """Complex rotations `[tokens, 1, head_dim / 2]` of positions `[tokens]`."""
        angles = positions.to(torch.float32).unsqueeze(1) * self._frequencies
        return (torch.polar(self._radius.expand_as(angles), angles).unsqueeze(1),)

    def table(self, positions: int) -> NDArray[np.complex64]:
        """Those of at least so many positions, `[positions, head_dim / 2]`, on a processor; made when first needed."""
        if positions > len(self._table):
            count = max(FEWEST_POSITIONS, 1 << (positions - 1).bit_length())
            self._table = self(torch.arange(count))[0].flatten(1).numpy()
        return self._table


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / sqrt(mean(x²) + ε) · weight: https://arxiv.org/abs/1910.07467."""

    weight: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden_size]` in and out."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def load_norm(config: PretrainedConfig, name: str, weights: Weights) -> RmsNorm:
    """The norm of that name. Raises Incompatible where the folder lacks it."""
    return RmsNorm(weights.read(f"{name}.weight"), config.rms_norm_eps)


@dataclass(frozen=True, slots=True)
class LeanLayer:
    """One decoder layer: attention and a gated feed-forward network, each behind an RMS norm."""

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    attention_norm: RmsNorm
    query_key_value: Linear
    # [heads + kv_heads, head_dim], where the family has one
    query_key_norm: Tensor | None
    query_key_epsilon: float
    attention_output: Linear
    feed_forward_norm: RmsNorm
    gate_up: Linear
    down: Linear

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """`[tokens, hidden_size]` in and out; leaves what it is given unchanged."""
        hidden = self._attention(self.attention_norm(hidden), rotary, attend).add_(hidden)
        gate, up = self.gate_up(self.feed_forward_norm(hidden)).chunk(2, dim=1)
        return self.down(F.silu(gate).mul_(up)).add_(hidden)

    def _attention(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        qkv = self.query_key_value(hidden).view(len(hidden), -1, self.head_dim)
        rotated = self.heads + self.kv_heads
        query_key, value = qkv[:, :rotated], qkv[:, rotated:]
        if self.query_key_norm is not None:
            query_key = F.rms_norm(query_key, (self.head_dim,), None, self.query_key_epsilon).mul_(self.query_key_norm)
        query_key = _rotate(query_key, rotary[0])
        query, key = query_key[:, : self.heads], query_key[:, self.heads :]
        return self.attention_output(attend(self.index, query, key, value, self.head_dim**-0.5, self.window))


def _rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Turns neighbouring pairs of `[tokens, heads, head_dim]`; in place where it is float32 already."""
    exact = vectors.float()
    torch.view_as_complex(exact.view(*exact.shape[:2], -1, 2)).mul_(rotation)
    return exact.to(vectors.dtype)


def load_layers(
    config: PretrainedConfig, first: int, end: int, weights: Weights, rotary: RotaryAngles
) -> tuple[list[LeanLayer], CompiledLayers | None]:
    """Reads layers `first` to `end`, and stacks them where kernels are to take them, which rotate by `rotary`.

    Raises Incompatible, which names the tensor, where the folder lacks one.
    """
    weight_format = weights.weight_format
    if not (weight_format.has_kernels(weights.device, weights.dtype) and _fits_kernels(config)):

        def linear_of(name: str, weight: Tensor, bias: Tensor | None) -> Linear:
            return linear(weight, bias, replace(weight_format, kernels=False))

        return [_load_layer(config, index, weights, linear_of) for index in range(first, end)], None
    # Only who needs it pays for loading the compiler.
    from stitch_server.model.compiled_layers import LayerAssembly

    assembly = LayerAssembly(end - first, weight_format)

    def assembled(place: int, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        assembly.take(place, name, weight, bias)
        if weight_format.keeps_twice(weights.device, weights.dtype):
            return linear(weight, bias, replace(weight_format, kernels=False))
        return assembly.linear(place, name)

    layers = [_load_layer(config, index, weights, partial(assembled, index - first)) for index in range(first, end)]
    return layers, assembly.compiled(layers, rotary, weights.dtype)


def _fits_kernels(config: PretrainedConfig) -> bool:
    """Whether gates and what they gate, one behind the other in one matrix, both begin where a panel does."""
    from stitch_server.cpu import PANEL_OUTPUTS

    fits: bool = config.intermediate_size % PANEL_OUTPUTS == 0
    return fits


def _load_layer(config: PretrainedConfig, index: int, weights: Weights, linear_of: LinearOf) -> LeanLayer:
    heads, keys, width = config.num_attention_heads, kv_heads(config), head_dim(config)
    at = f"model.layers.{index}"
    return LeanLayer(
        index=index,
        heads=heads,
        kv_heads=keys,
        head_dim=width,
        window=_window(config, index),
        attention_norm=load_norm(config, f"{at}.input_layernorm", weights),
        query_key_value=linear_of("query_key_value", *_query_key_value(weights, f"{at}.self_attn", heads, keys)),
        query_key_norm=_query_key_norm(weights, f"{at}.self_attn", heads, keys),
        query_key_epsilon=config.rms_norm_eps,
        attention_output=linear_of("attention_output", *_joined(weights, f"{at}.self_attn.o_proj")),
        feed_forward_norm=load_norm(config, f"{at}.post_attention_layernorm", weights),
        gate_up=linear_of("gate_up", *_joined(weights, f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")),
        down=linear_of("down", *_joined(weights, f"{at}.mlp.down_proj")),
    )


def _joined(weights: Weights, *names: str) -> tuple[Tensor, Tensor | None]:
    """One matrix and bias in place of several with the same input."""
    weight = torch.cat([weights.read(f"{name}.weight") for name in names])
    has_bias = f"{names[0]}.bias" in weights
    return weight, torch.cat([weights.read(f"{name}.bias") for name in names]) if has_bias else None


def _query_key_value(weights: Weights, at: str, heads: int, keys: int) -> tuple[Tensor, Tensor | None]:
    def joined(kind: str) -> Tensor:
        query = _pairs_as_neighbours(weights.read(f"{at}.q_proj.{kind}"), heads)
        key = _pairs_as_neighbours(weights.read(f"{at}.k_proj.{kind}"), keys)
        return torch.cat([query, key, weights.read(f"{at}.v_proj.{kind}")])

    return joined("weight"), joined("bias") if f"{at}.q_proj.bias" in weights else None


def _query_key_norm(weights: Weights, at: str, heads: int, keys: int) -> Tensor | None:
    if f"{at}.q_norm.weight" not in weights:
        return None
    query = _pairs_as_neighbours(weights.read(f"{at}.q_norm.weight"), 1)
    key = _pairs_as_neighbours(weights.read(f"{at}.k_norm.weight"), 1)
    return torch.cat([query.expand(heads, -1), key.expand(keys, -1)])


def _pairs_as_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorders each head's rows 0, 1, … n - 1 to 0, n/2, 1, n/2 + 1, …: the pairs of a rotation side by side."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _window(config: PretrainedConfig, index: int) -> int | None:
    """How many tokens a layer looks back, itself included; None: all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window
