"""Attention over the KV cache: one interface and three back ends.

`backend_for` chooses a back end for a `KVStore`: flash attention on a GPU that has the kernel (`flash.py`), compiled
kernels on a CPU (`cpu.py`), and PyTorch's SDPA for every other device and dtype (`sdpa.py`). A back end is called with
the spans of a batch and returns a `BatchAttention`, which each layer calls once: it writes the new keys and values into
the store and attends over every sequence's context. The results of the back ends differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stitch_server.attention.flash import FlashAttention, VarlenKernel
from stitch_server.attention.sdpa import SdpaAttention
from stitch_server.kv_cache.store import KVStore, Span

if TYPE_CHECKING:
    from stitch_server.cpu import PagedKV

# What rotates the queries and keys of a batch: tensors with one row a token, so that leading rows belong to leading
# tokens. Each model family makes and reads its own.
Rotary = tuple[Tensor, ...]
CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def leading(rotary: Rotary, tokens: int) -> Rotary:
    """The rotations of a batch's first `tokens` tokens."""
    return tuple(tensor[:tokens] for tensor in rotary)


class Attend(Protocol):
    """The attention that a decoder layer calls."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Writes the tokens' keys and values, and attends from each token to its sequence up to that token.

        `layer` is the index in the whole model; query `[tokens, heads, head_dim]`, key and value
        `[tokens, kv_heads, head_dim]`, already rotated, are views of a larger tensor. With a `window`, the token
        at position p sees positions p - window + 1 to p. Returns `[tokens, heads * head_dim]`.
        """
        ...


class Layer(Protocol):
    """One decoder layer."""

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Takes and returns `[tokens, hidden_size]`; leaves its arguments unchanged."""
        ...


class BatchAttention(Attend, Protocol):
    """Attention for one batch of packed segments."""

    @property
    def paged_kv(self) -> PagedKV | None:
        """The batch's slots, for compiled layers that attend by themselves; None on other back ends."""
        ...

    def leading(self, segments: int) -> BatchAttention:
        """Attention for the first `segments` segments of the batch alone."""
        ...


AttentionBackend = Callable[[Sequence[Span]], BatchAttention]


def backend_for(store: KVStore, kernel: VarlenKernel | None = None) -> AttentionBackend:
    """The back end that attends over `store`: by `kernel`, if given, whose pages are the store's blocks."""
    if kernel is not None:
        return partial(FlashAttention.of_spans, store, kernel)
    if store.kv.device.type == "cpu" and store.kv.dtype in CPU_KERNEL_DTYPES:
        # Imported here, since only this back end needs the compiler.
        from stitch_server.attention.cpu import compiled_backend

        return compiled_backend(store)
    return partial(SdpaAttention, store)
