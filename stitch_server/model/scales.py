"""The numbers by which some families scale embeddings and logits. Knows neither layers nor weights."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig


def embedding_scale(config: PretrainedConfig) -> float:
    """What the rows of the embedding are multiplied by: Granite's multiplier, Gemma's root of the width."""
    if config.model_type == "gemma":
        return float(config.hidden_size**0.5)
    return float(getattr(config, "embedding_multiplier", 1.0))


def logit_scale(config: PretrainedConfig) -> float:
    """What logits are multiplied by: Cohere names a factor, Granite a divisor."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def scaled(values: Tensor, scale: float) -> Tensor:
    """The values themselves where there is nothing to scale."""
    return values if scale == 1.0 else values * scale
