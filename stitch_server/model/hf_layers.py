"""Decoder layers and norms of `transformers`, for families without native layers: a range of layers at a time.

`FAMILIES` are those whose results the tests compare with the whole model's. To add one, put its name there and run the
tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stitch.errors import Incompatible
from stitch_server.attention import Attend, Layer, Rotary
from stitch_server.model.llama import ROPE_TYPES
from stitch_server.model.weights import Weights

FAMILIES = (
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "glm",
    "glm4",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "olmo",
    "olmo2",
    "phi3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
ATTENTION = "stitch"


def check_supported(config: PretrainedConfig) -> None:
    """Raises Incompatible for a model that these layers would not compute as its own family does."""
    rope_type = getattr(config, "rope_parameters", {}).get("rope_type")
    if config.model_type not in FAMILIES:
        raise Incompatible(f"the family {config.model_type} is none of {', '.join(FAMILIES)}")
    if rope_type not in ROPE_TYPES:
        raise Incompatible(f"the rotary embedding {rope_type} depends on the length of the sequence")


def load_layers(config: PretrainedConfig, first: int, end: int, weights: Weights) -> list[Layer]:
    """Reads layers `first` to `end`. Raises Incompatible, which names the tensor, if the folder lacks one."""
    decoder = _skeleton(config).model
    return [TransformersLayer(_filled(decoder.layers[at], f"model.layers.{at}", weights)) for at in range(first, end)]


def load_norm(config: PretrainedConfig, weights: Weights) -> nn.Module:
    """Reads the norm after the last layer, `[tokens, hidden_size]` in and out."""
    return _filled(_skeleton(config).model.norm, "model.norm", weights)


class TransformersAngles:
    """RoPE's rotations by the family's own module."""

    def __init__(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._embedding = type(_skeleton(config).model.rotary_emb)(config).to(device)
        self._like = torch.empty(0, device=device, dtype=dtype)

    def __call__(self, positions: Tensor) -> Rotary:
        """Returns cosines and sines `[tokens, rotated]` of positions `[tokens]`."""
        cosines, sines = self._embedding(self._like, positions.unsqueeze(0))
        return cosines[0], sines[0]


@dataclass(frozen=True, slots=True)
class TransformersLayer:
    """One of the family's own layers, which reaches the KV cache through a registered attention function."""

    module: nn.Module

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Takes and returns `[tokens, hidden_size]`; leaves its arguments unchanged."""
        cosines, sines = rotary
        angles = cosines.unsqueeze(0), sines.unsqueeze(0)
        output = self.module(hidden.unsqueeze(0), position_embeddings=angles, attention_mask=None, attend=attend)
        result: Tensor = output[0] if isinstance(output, Tensor) else output[0][0]
        return result


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers` layers; query, key and value are `[1, heads, tokens, head_dim]`."""
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attended = attend(module.layer_idx, queries, keys, values, scaling, sliding_window)
    return attended.view(1, query.shape[2], query.shape[1], -1), None


AttentionInterface.register(ATTENTION, _attention)


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Builds the whole model without memory for its weights."""
    check_supported(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=ATTENTION
        )
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def _filled(module: nn.Module, prefix: str, weights: Weights) -> nn.Module:
    stored = {name: weights.read(f"{prefix}.{name}") for name in module.state_dict()}
    module.load_state_dict(stored, assign=True)
    return module.requires_grad_(False)
