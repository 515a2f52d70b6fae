"""A model's own layers as a frozen whole, over sequences instead of sessions. Knows no cache and no stitch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stitch_server.attention import backend_for
from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import read_config
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.weights import EMBEDDING, Weights


class WholeModel:
    """Embedding, all layers and head of one model folder; a `frozen.FrozenModel`."""

    def __init__(self, embedding: Embedding, layers: DecoderLayers, head: DenseHead, dtype: torch.dtype) -> None:
        self._embedding, self._layers, self._head, self._dtype = embedding, layers, head, dtype
        self._device = head.rows.device

    @classmethod
    def load(cls, folder: Path, layers: int, device: torch.device, dtype: torch.dtype) -> WholeModel:
        """Raises Incompatible where the folder does not hold `layers` layers of a known family."""
        decoder = DecoderLayers.load(folder, 0, layers, device, dtype)
        return cls(Embedding.load(folder, device, dtype), decoder, DenseHead.load(folder, device, dtype), dtype)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self._layers.end

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self._layers.hidden_size

    def embed(self, tokens: Tensor) -> Tensor:
        """`[sequences, tokens]` to the hidden states before layer 0, `[sequences, tokens, hidden]`."""
        return self._embedding(tokens)

    def run(self, hidden: Tensor, first: int, end: int, adapters: Adapters | None = None) -> Tensor:
        """Hidden states `[sequences, tokens, hidden]` through layers [first, end), each sequence from position 0 on."""
        sequences, length, _ = hidden.shape
        rotary = self._layers.rotary(torch.arange(length, device=hidden.device).repeat(sequences))
        packed = hidden.to(self._dtype).flatten(0, 1)
        attend, adapted = CausalSequences(sequences), self._adapted(adapters)
        return self._layers.run(packed, rotary, attend, first, end, adapted).view(sequences, length, -1)

    def new_store(self, first: int, end: int, blocks: int) -> KVStore:
        """Room for the keys and values of layers [first, end)."""
        layers = self._layers
        return KVStore(first, end, blocks, layers.kv_heads, layers.head_dim, self._device, self._dtype)

    def extend(self, rows: Tensor, spans: Sequence[Span], store: KVStore, adapters: Adapters | None = None) -> Tensor:
        """Hidden states `[rows, hidden]` of sequences that extend their `spans`, through the layers of `store`."""
        positions = torch.cat([torch.arange(span.position, span.end, device=rows.device) for span in spans])
        rotary = self._layers.rotary(positions)
        attend, adapted = backend_for(store)(spans), self._adapted(adapters)
        return self._layers.run(rows.to(self._dtype), rotary, attend, store.first, store.end, adapted)

    def logits(self, rows: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Hidden states `[rows, hidden]` behind the last layer to float32 `[rows, vocabulary]`, or of these tokens."""
        return self._head(rows.to(self._dtype), token_ids)

    def _adapted(self, adapters: Adapters | None) -> list[tuple[slice, Adapters]]:
        return [] if adapters is None else [(slice(None), adapters.to(self._device, self._dtype))]

    def head_rows(self) -> Tensor:
        """The LM head with the final norm's gains multiplied in, `[vocabulary, hidden]`."""
        return self._head.rows * self._head.norm


@dataclass(frozen=True)
class DenseHead:
    """Final norm and LM head as plain matrices, so that single tokens' rows can be taken out."""

    norm: Tensor
    epsilon: float
    rows: Tensor

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> DenseHead:
        """A tied head is the embedding. Raises Incompatible where either is missing."""
        config = read_config(folder)
        name = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        with Weights(folder, device, dtype) as weights:
            return cls(weights.read("model.norm.weight"), config.rms_norm_eps, weights.read(name))

    def __call__(self, hidden: Tensor, token_ids: Tensor | None) -> Tensor:
        """`[rows, hidden]` to float32 `[rows, vocabulary]`, or `[rows, len(token_ids)]`."""
        normed = F.rms_norm(hidden, self.norm.shape, self.norm, self.epsilon)
        return F.linear(normed, self.rows if token_ids is None else self.rows[token_ids]).float()


class CausalSequences:
    """Attention inside each of `sequences` sequences of one length, packed one behind the other; keeps nothing."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `model.attend.Attend` says."""
        query, key, value = (self._sequence_wise(part) for part in (query, key, value))
        length = query.shape[2]
        mask = None if window is None or window >= length else banded(length, window, query.device)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)

    def _sequence_wise(self, packed: Tensor) -> Tensor:
        """`[tokens, heads, head_dim]` to `[sequences, heads, tokens, head_dim]`."""
        return packed.view(self._sequences, -1, *packed.shape[1:]).transpose(1, 2)


def banded(length: int, window: int, device: torch.device) -> Tensor:
    """bool `[length, length]`: token p sees p - window + 1 to p."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)
