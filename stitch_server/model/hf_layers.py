"""Decoder layers and norms of `transformers`, where there are no native layers: a range of layers at a time.

`FAMILIES` are those whose results the tests compare with the whole model's. To add one, put its name there and run the
tests. `transformers` is imported when it is first needed, since that takes three seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stitch.errors import Incompatible, shown
from stitch_server.attention import Attend, Layer, Rotary
from stitch_server.model.llama_config import ROPE_TYPES
from stitch_server.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_supported(config: PretrainedConfig) -> None:
    """Raises Incompatible, which names the field, for a model that no layers here compute as its family does."""
    from transformers.activations import ACT2FN

    rope_type = (config.rope_parameters or {}).get("rope_type")
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if rope_type not in ROPE_TYPES:
        served = f"whose rotations depend on the position alone: {', '.join(ROPE_TYPES)}"
        raise Incompatible(f"rope_parameters.rope_type is {shown(rope_type)}, which is none of those {served}")
    if config.hidden_act not in ACT2FN:
        raise Incompatible(f"hidden_act is {shown(config.hidden_act)}, which is no activation function")
    if not getattr(config, "is_causal", True):
        raise Incompatible("is_causal is false: attention to later tokens generates no text")
    if keys is not None and (keys < 1 or heads % keys):
        raise Incompatible(f"num_attention_heads is {heads}, which is no multiple of num_key_value_heads {keys}")
    if config.max_position_embeddings < 1:
        raise Incompatible(f"max_position_embeddings is {config.max_position_embeddings}; it must be at least 1")
    _check_windows(config)


def _check_windows(config: PretrainedConfig) -> None:
    # Other families ignore these fields.
    window = config.sliding_window if hasattr(type(config), "sliding_window") else None
    types = set(config.layer_types) if hasattr(type(config), "layer_types") else set()
    if unknown := types - LAYER_TYPES:
        raise Incompatible(f"layer_types has {shown(min(unknown))}, which is none of {', '.join(sorted(LAYER_TYPES))}")
    if window is None and "sliding_attention" in types:
        raise Incompatible("layer_types has 'sliding_attention', but sliding_window is null")
    if window is not None and window < 1:
        raise Incompatible(f"sliding_window is {window}; it must be at least 1")


def tensor_shapes(config: PretrainedConfig) -> dict[str, list[int]]:
    """Returns the shape of every tensor of such a model by name.

    Raises what its family raises for fields that do not fit each other.
    """
    model, position = _skeleton(config), torch.zeros(1)
    rotary = TransformersAngles(config, position.device, position.dtype)(position)
    hidden = torch.empty(1, config.hidden_size, device="meta")
    with torch.inference_mode():
        TransformersLayer(model.model.layers[0])(
            hidden, tuple(angles.to("meta") for angles in rotary), lambda index, query, *_: query.flatten(1)
        )
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


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


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Builds the whole model without memory for its weights, of the code in `transformers` alone."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    AttentionInterface.register(ATTENTION, _attention)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=ATTENTION, trust_remote_code=False
        )
    return model.eval()  # type: ignore[no-untyped-call, no-any-return]


def _filled(module: nn.Module, prefix: str, weights: Weights) -> nn.Module:
    stored = {name: weights.read(f"{prefix}.{name}") for name in module.state_dict()}
    module.load_state_dict(stored, assign=True)
    return module.requires_grad_(False)
