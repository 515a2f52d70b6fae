"""The two ends of a model: token ids to the hidden states of layer 0, and those of the last layer to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.devices import HugePageArena
from stitch_server.model import hf_layers, llama
from stitch_server.model.description import Config, read_config
from stitch_server.model.linear import Linear, linear
from stitch_server.model.llama_config import LlamaConfig
from stitch_server.model.weights import AS_STORED, EMBEDDING, HEAD, WeightFormat, Weights


class Embedding:
    """The embedding matrix: one row of hidden states for each token of the vocabulary."""

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        self._rows = rows
        self._scale = scale

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Embedding:
        """Reads the matrix. Raises Incompatible if the folder lacks it."""
        with Weights(folder, device, dtype) as weights:
            config = read_config(folder)
            # A tied pair may be stored as the head alone.
            is_stored = EMBEDDING in weights or not config.tie_word_embeddings
            rows = weights.read(EMBEDDING if is_stored else HEAD)
        if device.type == "cpu":
            # Copied out of the file at once: mapping a row when a token first needs it takes that token some 250 µs.
            rows = HugePageArena().copy(rows)
        return cls(rows, _embedding_scale(config))

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 `[tokens]` to hidden states `[tokens, hidden_size]`."""
        return _scaled(F.embedding(token_ids, self._rows), self._scale)


class Head:
    """The final norm and the language-model head."""

    def __init__(
        self, norm: Callable[[Tensor], Tensor], to_logits: Linear, vocabulary_size: int, scale: float = 1.0
    ) -> None:
        # The number of logits.
        self.vocabulary_size = vocabulary_size
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
        """Reads norm and head; the embedding is a tied head that isn't stored. Raises Incompatible if one is missing.

        Rows from `tokens` on only pad the vocabulary; without them no padding token can be chosen.
        """
        config = read_config(folder)
        with Weights(folder, device, dtype) as weights:
            rows = weights.read(weights.head_name(config.tie_word_embeddings))[:tokens]
            norm: Callable[[Tensor], Tensor]
            if isinstance(config, LlamaConfig):
                norm = llama.load_norm(config, "model.norm", weights)
            else:
                norm = hf_layers.load_norm(config, weights)
            return cls(norm, linear(rows, None, weight_format.for_head), len(rows), _logit_scale(config))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, hidden_size]` to logits float32 `[n, vocabulary]`."""
        return _scaled(self._to_logits(self._norm(hidden)).float(), self._scale)


def _embedding_scale(config: Config) -> float:
    """Returns the factor of the embedding: Granite's multiplier, Gemma's root of the hidden size."""
    if isinstance(config, LlamaConfig):
        return 1.0
    if config.model_type == "gemma":
        return float(config.hidden_size**0.5)
    return float(config.embedding_multiplier) if config.model_type == "granite" else 1.0


def _logit_scale(config: Config) -> float:
    """Returns the factor of the logits: Cohere names a factor, Granite a divisor."""
    if isinstance(config, LlamaConfig):
        return 1.0
    if config.model_type == "granite":
        return 1.0 / float(config.logits_scaling)
    return float(config.logit_scale) if config.model_type in ("cohere", "cohere2") else 1.0


def _scaled(values: Tensor, scale: float) -> Tensor:
    """Multiplies by the scale; returns the same tensor if it is 1."""
    return values if scale == 1.0 else values * scale
