"""Token ids to the hidden states that enter layer 0. Knows no text."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.huge_pages import HugePageArena
from stitch_server.model.description import read_config
from stitch_server.model.scales import embedding_scale, scaled
from stitch_server.model.weights import Weights

EMBEDDING = "model.embed_tokens.weight"


class Embedding:
    """One row of hidden states a token of the vocabulary."""

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        self._rows = rows
        self._scale = scale

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Embedding:
        """Raises Incompatible where the folder lacks the rows."""
        with Weights(folder, device, dtype) as weights:
            rows = weights.read(EMBEDDING)
        if device.type == "cpu":
            # Out of the file at once: a row that is mapped when a token first asks for it takes it some 250 µs.
            rows = HugePageArena().copy(rows)
        return cls(rows, embedding_scale(read_config(folder)))

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 `[tokens]` to hidden states `[tokens, hidden_size]`."""
        return scaled(F.embedding(token_ids, self._rows), self._scale)
