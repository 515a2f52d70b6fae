"""Token ids to the hidden states that enter layer 0. Knows no text."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.model.weights import Weights

EMBEDDING = "model.embed_tokens.weight"


class Embedding:
    """One row of hidden states a token of the vocabulary."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Embedding:
        """Raises Incompatible where the folder lacks the rows."""
        with Weights(folder, device, dtype) as weights:
            return cls(weights.read(EMBEDDING))

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 `[tokens]` to hidden states `[tokens, hidden_size]`."""
        return F.embedding(token_ids, self._rows)
