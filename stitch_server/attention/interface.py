"""What a decoder layer asks of the cache. Doesn't know how anything is kept."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# What the positions of a batch turn queries and keys by: tensors with one row a token, so that leading rows stand
# for leading tokens. Made and read by one family's layers; opaque to others.
Rotary = tuple[Tensor, ...]


def leading(rotary: Rotary, rows: int) -> Rotary:
    """Of the batch's leading tokens."""
    return tuple(part[:rows] for part in rotary)


class Attend(Protocol):
    """What the KV cache offers to a layer."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Keeps the tokens' keys and values, and attends to all that their sessions have up to each token.

        `layer` is its index in the whole model; query `[tokens, heads, head_dim]`, key and value
        `[tokens, kv_heads, head_dim]`, rotated already, are views of a larger tensor. With a `window`, a token
        at position p sees positions p - window + 1 to p only. Returns `[tokens, heads * head_dim]`.
        """
        ...


class Layer(Protocol):
    """One decoder layer."""

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """`[tokens, hidden_size]` in and out; leaves what it is given unchanged."""
        ...
