"""The end of a model: final norm and language-model head. Doesn't choose a token."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.model.description import read_config
from stitch_server.model.embedding import EMBEDDING
from stitch_server.model.product import Product, product
from stitch_server.model.weights import Weights


class Head:
    """Hidden states behind the last layer to logits."""

    def __init__(self, norm: Tensor, norm_epsilon: float, to_logits: Product) -> None:
        self._norm = norm
        self._norm_epsilon = norm_epsilon
        self._to_logits = to_logits

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, tokens: int | None = None) -> Head:
        """Reads norm and head; a tied head is the embedding. Raises Incompatible where either is missing.

        Rows behind the first `tokens` only pad the vocabulary; without them no such token can be chosen.
        """
        config = read_config(folder)
        with Weights(folder, device, dtype) as weights:
            rows = weights.read(EMBEDDING if config.tie_word_embeddings else "lm_head.weight")
            return cls(weights.read("model.norm.weight"), config.rms_norm_eps, product(rows[:tokens]))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, hidden_size]` to logits float32 `[n, vocabulary]`."""
        normed = F.rms_norm(hidden, self._norm.shape, self._norm, self._norm_epsilon)
        return self._to_logits(normed).float()
