"""Reads the native layers of `llama.py` from a model folder, and packs them for the CPU kernels where these are used.

Joins the matrices that have the same input, and stores the pairs of a rotation side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stitch_server import cpu
from stitch_server.model.linear import Linear, linear
from stitch_server.model.llama import NativeLayer, RotaryAngles, load_norm
from stitch_server.model.llama_config import LlamaConfig
from stitch_server.model.weights import Weights

if TYPE_CHECKING:
    from stitch_server.model.compiled_layers import CompiledLayers

# Takes a matrix's name in `stitch_server.cpu.Layers`, the matrix `[outputs, inputs]` and its bias.
MakeLinear = Callable[[str, Tensor, Tensor | None], Linear]


def load_layers(
    config: LlamaConfig, first: int, end: int, weights: Weights, rotary: RotaryAngles
) -> tuple[list[NativeLayer], CompiledLayers | None]:
    """Reads layers `first` to `end`, also packed for the CPU kernels where these are used.

    Raises Incompatible, which names the tensor, if the folder lacks one.
    """
    weight_format = weights.weight_format
    library_format = replace(weight_format, kernels=False)
    if not (weight_format.uses_kernels(weights.device, weights.dtype) and _fits_kernels(config)):

        def library_linear(name: str, weight: Tensor, bias: Tensor | None) -> Linear:
            return linear(weight, bias, library_format)

        return [_load_layer(config, index, weights, library_linear) for index in range(first, end)], None
    # Imported here, since the compiler takes a second to load.
    from stitch_server.model.compiled_layers import LayerAssembly

    assembly = LayerAssembly(end - first, weight_format)

    def packed_linear(index: int, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        assembly.add(index, name, weight, bias)
        if weight_format.keeps_two_layouts(weights.device, weights.dtype):
            return linear(weight, bias, library_format)
        return assembly.linear(index, name)

    layers = [_load_layer(config, index, weights, partial(packed_linear, index - first)) for index in range(first, end)]
    return layers, assembly.finish(layers, rotary, weights.dtype)


def _fits_kernels(config: LlamaConfig) -> bool:
    """Whether the up projections begin at a panel of the joined matrix, as the gate projections do."""
    return config.intermediate_size % cpu.PANEL_OUTPUTS == 0


def _load_layer(config: LlamaConfig, index: int, weights: Weights, make_linear: MakeLinear) -> NativeLayer:
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    prefix = f"model.layers.{index}"
    return NativeLayer(
        index=index,
        heads=heads,
        kv_heads=keys,
        head_dim=config.head_dim,
        window=config.window(index),
        attention_norm=load_norm(config, f"{prefix}.input_layernorm", weights),
        query_key_value=make_linear("query_key_value", *_query_key_value(weights, f"{prefix}.self_attn", heads, keys)),
        query_key_norm=_query_key_norm(weights, f"{prefix}.self_attn", heads, keys),
        query_key_epsilon=config.rms_norm_eps,
        attention_output=make_linear("attention_output", *_concatenate(weights, f"{prefix}.self_attn.o_proj")),
        feed_forward_norm=load_norm(config, f"{prefix}.post_attention_layernorm", weights),
        gate_up=make_linear("gate_up", *_concatenate(weights, f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")),
        down=make_linear("down", *_concatenate(weights, f"{prefix}.mlp.down_proj")),
    )


def _concatenate(weights: Weights, *names: str) -> tuple[Tensor, Tensor | None]:
    """Concatenates matrices and biases that have the same input."""
    weight = torch.cat([weights.read(f"{name}.weight") for name in names])
    has_bias = f"{names[0]}.bias" in weights
    return weight, torch.cat([weights.read(f"{name}.bias") for name in names]) if has_bias else None


def _query_key_value(weights: Weights, at: str, heads: int, keys: int) -> tuple[Tensor, Tensor | None]:
    def concatenated(kind: str) -> Tensor:
        query = _pairs_as_neighbours(weights.read(f"{at}.q_proj.{kind}"), heads)
        key = _pairs_as_neighbours(weights.read(f"{at}.k_proj.{kind}"), keys)
        return torch.cat([query, key, weights.read(f"{at}.v_proj.{kind}")])

    return concatenated("weight"), concatenated("bias") if f"{at}.q_proj.bias" in weights else None


def _query_key_norm(weights: Weights, at: str, heads: int, keys: int) -> Tensor | None:
    if f"{at}.q_norm.weight" not in weights:
        return None
    query = _pairs_as_neighbours(weights.read(f"{at}.q_norm.weight"), 1)
    key = _pairs_as_neighbours(weights.read(f"{at}.k_norm.weight"), 1)
    return torch.cat([query.expand(heads, -1), key.expand(keys, -1)])


def _pairs_as_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorders each head's rows 0, 1, … n - 1 to 0, n/2, 1, n/2 + 1, …: the pairs of a rotation side by side."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
