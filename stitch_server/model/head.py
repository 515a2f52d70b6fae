"""The end of a model: final norm and language-model head. Doesn't choose a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stitch_server.model import hf_layers, llama
from stitch_server.model.description import read_config
from stitch_server.model.embedding import EMBEDDING
from stitch_server.model.linear import AS_STORED, Linear, WeightFormat, linear
from stitch_server.model.scales import logit_scale, scaled
from stitch_server.model.weights import Weights


class Head:
    """Hidden states behind the last layer to logits."""

    def __init__(self, norm: Callable[[Tensor], Tensor], to_logits: Linear, scale: float = 1.0) -> None:
        self._norm = norm
        self._to_logits = to_logits
        self._scale = scale

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int | None = None,
        weight_format: WeightFormat = AS_STORED,
    ) -> Head:
        """Reads norm and head; a tied head is the embedding. Raises Incompatible where either is missing.

        Rows behind the first `tokens` only pad the vocabulary; without them no such token can be chosen.
        """
        config = read_config(folder)
        with Weights(folder, device, dtype) as weights:
            rows = weights.read(EMBEDDING if config.tie_word_embeddings else "lm_head.weight")
            is_lean = llama.supports(config)
            norm = llama.load_norm(config, "model.norm", weights) if is_lean else hf_layers.load_norm(config, weights)
            return cls(norm, linear(rows[:tokens], None, weight_format.for_head), logit_scale(config))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, hidden_size]` to logits float32 `[n, vocabulary]`."""
        return scaled(self._to_logits(self._norm(hidden)).float(), self._scale)
