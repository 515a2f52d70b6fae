"""Whole models that are run in parts and never change. Knows no stitch and no data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore
from stitch_server.model.adapters import Adapters
from stitch_training.trace import TEACHER_TOKENS, Teacher

# Rows of logits in memory at a time; with a vocabulary of 152 k and in float32 one has 0.6 MB.
LOGIT_ROWS = 256


class FrozenModel(Protocol):
    """Sequences are causal and begin at position 0. Gradients go through to the hidden states, not to the weights.

    A token that passes `adapters` passes them beside every layer; gradients go through to these as well.
    """

    @property
    def depth(self) -> int:
        """Number of decoder layers."""

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""

    def embed(self, tokens: Tensor) -> Tensor:
        """`[sequences, tokens]` to the hidden states before layer 0, `[sequences, tokens, hidden]`."""

    def run(self, hidden: Tensor, first: int, end: int, adapters: Adapters | None = None) -> Tensor:
        """Hidden states `[sequences, tokens, hidden]` through layers [first, end)."""

    def new_store(self, first: int, end: int, blocks: int) -> KVStore:
        """Room for the keys and values of layers [first, end)."""

    def extend(self, rows: Tensor, spans: Sequence[Span], store: KVStore, adapters: Adapters | None = None) -> Tensor:
        """Hidden states `[rows, hidden]` of sequences that extend their `spans`, through the layers of `store`."""

    def logits(self, rows: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Hidden states `[rows, hidden]` behind the last layer to float32 `[rows, vocabulary]`, or of these tokens."""

    def head_rows(self) -> Tensor:
        """The LM head with the final norm's gains multiplied in, `[vocabulary, hidden]`."""


@dataclass(frozen=True)
class Pair:
    """A bottom and a top model; one object twice where a model is cut against itself."""

    bottom: FrozenModel
    top: FrozenModel
    # Tokens that both know; rows beyond are padding of one of them.
    vocabulary: int


def states_at(model: FrozenModel, tokens: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
    """Hidden states `[sequences, tokens, hidden]` of `tokens` behind each of `depths` layers."""
    hidden, reached, states = model.embed(tokens), 0, {}
    for depth in sorted(set(depths)):
        hidden = model.run(hidden, reached, depth) if depth > reached else hidden
        reached, states[depth] = depth, hidden
    return states


def teacher_of(model: FrozenModel, hidden: Tensor, vocabulary: int) -> Teacher:
    """The likeliest of the first `vocabulary` tokens after last-layer states `[sequences, tokens, hidden]`."""
    kept = [_likeliest(model.logits(rows)[:, :vocabulary]) for rows in torch.split(hidden.flatten(0, 1), LOGIT_ROWS)]
    shape = (*hidden.shape[:2], TEACHER_TOKENS)
    ids, logprobs = (torch.cat(parts).view(shape) for parts in zip(*kept, strict=True))
    return Teacher(ids, logprobs)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(TEACHER_TOKENS)
    return ids, values - logits.logsumexp(-1, keepdim=True)


def next_token_losses(model: FrozenModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy `[sequences, tokens - 1]` of each following token, in nats; `hidden` is the last layer's."""
    rows, following = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    parts = zip(torch.split(rows, LOGIT_ROWS), torch.split(following, LOGIT_ROWS), strict=True)
    losses = [torch.nn.functional.cross_entropy(model.logits(part), ids, reduction="none") for part, ids in parts]
    return torch.cat(losses).view(len(tokens), -1)
