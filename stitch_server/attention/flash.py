"""Attention over blocks where they lie, by flash attention: one kernel a layer for all sequences of a batch.

The kernel is PyTorch's own `varlen_attn`, or any function like it. What it has to know of the batch travels to the
device once, before the first layer, and nothing comes back. Knows no graph and no route.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from stitch_server.devices import to_device_async
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.span import Span

if TYPE_CHECKING:
    from stitch_server.kv_cache.store import KVStore

# What PyTorch 2.13's kernel, flash attention 2, demands: `mha_varlen_fwd` in its flash_api.cpp.
PAGE_TOKENS = 256
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_STEP, MOST_HEAD_DIM = 8, 256
# Ampere.
LEAST_CAPABILITY = (8, 0)
# One pass over each past: sharing it out gives wrong rows (https://github.com/pytorch/pytorch/issues/194167), and a
# sequence would get other last bits in another batch.
SPLITS = 1


class Kernel(Protocol):
    """`torch.nn.attention.varlen.varlen_attn`, as far as it is asked here; returns `[tokens, heads, head_dim]`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The kernel that attends there over pages of `PAGE_TOKENS`; None where there is none."""
    if device.type != "cuda" or dtype not in DTYPES or head_dim % HEAD_DIM_STEP or head_dim > MOST_HEAD_DIM:
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    # Only who needs it pays for loading it.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def packed_places(spans: Sequenced[Span], block_tokens: int, width: int = 0) -> Tensor:
    """All that a kernel has to know of a batch, in one int32 tensor on the host; `Places.unpacked` says what is where.

    There are so many pages for each sequence as the longest one has, or `width`.
    """
    used = [span.blocks[: blocks_for(span.end, block_tokens)] for span in spans]
    pages = np.zeros((len(spans), max(width, *map(len, used))), np.int32)
    slots = []
    for row, span, blocks in zip(pages, spans, used, strict=True):
        row[: len(blocks)] = blocks
        new = np.arange(span.position, span.end)
        slots.append(row[new // block_tokens] * block_tokens + new % block_tokens)
    rows, ends = accumulate((span.length for span in spans), initial=0), [span.end for span in spans]
    bounds = np.array([*rows, *accumulate(ends, initial=0), *ends])
    return torch.from_numpy(np.concatenate([*slots, bounds, pages.ravel()], dtype=np.int32))


@dataclass(frozen=True, slots=True)
class Places:
    """Where a batch's new tokens are written, and what its sequences see, on the device."""

    # int64 [tokens]
    new_slots: Tensor
    # int32 [sequences + 1]: where each one's rows begin in the batch, and where its tokens would if none were paged.
    rows: Tensor
    pasts: Tensor
    # int32 [sequences]: how many tokens each one has, the new ones included.
    ends: Tensor
    # int32 [sequences, pages]
    pages: Tensor
    # No sequence has more new tokens or more in all; known to the host.
    most_new: int
    most_seen: int

    @classmethod
    def unpacked(cls, packed: Tensor, tokens: int, sequences: int, most_new: int, most_seen: int) -> Places:
        """From `packed_places` on the device."""
        sizes = [tokens, sequences + 1, sequences + 1, sequences]
        slots, rows, pasts, ends, pages = torch.split(packed, [*sizes, len(packed) - sum(sizes)])
        return cls(slots.long(), rows, pasts, ends, pages.view(sequences, -1), most_new, most_seen)

    def first(self, sequences: int, tokens: int) -> Places:
        """Of the leading sequences alone."""
        return Places(
            self.new_slots[:tokens],
            self.rows[: sequences + 1],
            self.pasts[: sequences + 1],
            self.ends[:sequences],
            self.pages[:sequences],
            self.most_new,
            self.most_seen,
        )


class FlashAttention:
    """Writes a batch's new keys and values into their blocks and attends to them there."""

    paged = None

    def __init__(self, store: KVStore, kernel: Kernel, lengths: Sequenced[int], places: Places) -> None:
        """`lengths`: of the batch's segments."""
        self._store, self._kernel = store, kernel
        self._lengths, self._places = lengths, places

    @classmethod
    def of(cls, store: KVStore, kernel: Kernel, spans: Sequenced[Span]) -> FlashAttention:
        """For packed segments."""
        lengths = [span.length for span in spans]
        packed = to_device_async(packed_places(spans, store.block_tokens), store.kv.device)
        most_seen = max(span.end for span in spans)
        return cls(store, kernel, lengths, Places.unpacked(packed, sum(lengths), len(spans), max(lengths), most_seen))

    def first(self, segments: int) -> FlashAttention:
        """The same for the leading `segments` of the batch alone."""
        lengths = self._lengths[:segments]
        return FlashAttention(self._store, self._kernel, lengths, self._places.first(segments, sum(lengths)))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `stitch_server.attention.interface.Attend` says."""
        at, places = layer - self._store.first, self._places
        keys, values = self._store.keys[at], self._store.values[at]
        keys.index_copy_(0, places.new_slots, key)
        values.index_copy_(0, places.new_slots, value)
        paged = (self._store.blocks, self._store.block_tokens, *key.shape[1:])
        attended = self._kernel(
            query,
            keys.view(paged),
            values.view(paged),
            places.rows,
            # The kernel wants it, and reads `seqused_k` instead.
            places.pasts,
            places.most_new,
            places.most_seen,
            scale=scale,
            # How many tokens to either side of its own a token sees; -1: all.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=places.ends,
            block_table=places.pages,
            num_splits=SPLITS,
        )
        return cast(Tensor, attended).flatten(1)
