"""Flash attention over the KV cache's own blocks: one kernel a layer for all sequences of a batch.

The kernel is PyTorch's `varlen_attn`, or a function with the same signature. A batch's metadata (slots, sequence
bounds, block table) is copied to the device once, in one tensor, before the first layer; no layer synchronizes with
the host, so a pass can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from stitch_server.devices import to_device_async
from stitch_server.kv_cache.block_pool import blocks_for
from stitch_server.kv_cache.store import KVStore, Span

# What flash attention 2 in PyTorch 2.13 requires: `mha_varlen_fwd` in its flash_api.cpp.
PAGE_TOKENS = 256
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256
# Ampere.
MIN_CAPABILITY = (8, 0)
# One pass over each context: splitting it gives wrong rows (https://github.com/pytorch/pytorch/issues/194167), and the
# last bits of a sequence's results would depend on its batch.
NUM_SPLITS = 1


class VarlenKernel(Protocol):
    """The part of `torch.nn.attention.varlen.varlen_attn` that is used; returns `[tokens, heads, head_dim]`."""

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


def varlen_kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenKernel | None:
    """The kernel for pages of `PAGE_TOKENS` on `device`; None if it doesn't support the device, dtype or head size."""
    if device.type != "cuda" or dtype not in DTYPES or head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None
    # Imported here, since loading it takes time.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def pack_metadata(spans: Sequenced[Span], block_tokens: int, table_width: int = 0) -> Tensor:
    """The metadata of a batch as one int32 tensor on the host, in the order in which `FlashMetadata.unpack` splits it.

    The block table has as many columns as the longest sequence has blocks, or `table_width` if that is more.
    """
    used = [span.blocks[: blocks_for(span.end, block_tokens)] for span in spans]
    table = np.zeros((len(spans), max(table_width, *map(len, used))), np.int32)
    slots = []
    for row, span, blocks in zip(table, spans, used, strict=True):
        row[: len(blocks)] = blocks
        new = np.arange(span.position, span.end)
        slots.append(row[new // block_tokens] * block_tokens + new % block_tokens)
    query_bounds, ends = accumulate((span.length for span in spans), initial=0), [span.end for span in spans]
    bounds = np.array([*query_bounds, *accumulate(ends, initial=0), *ends])
    return torch.from_numpy(np.concatenate([*slots, bounds, table.ravel()], dtype=np.int32))


@dataclass(frozen=True, slots=True)
class FlashMetadata:
    """What the kernel needs to know of a batch, on the device; names as in `VarlenKernel`."""

    # int64 [tokens]: where each new token's key and value are written.
    slot_mapping: Tensor
    # int32 [sequences + 1]: cumulated query lengths, and cumulated KV lengths.
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    # int32 [sequences]: the KV length of each sequence, new tokens included.
    seqused_k: Tensor
    # int32 [sequences, blocks]
    block_table: Tensor
    # Upper bounds of the query and KV lengths, on the host.
    max_q: int
    max_k: int

    @classmethod
    def unpack(cls, packed: Tensor, tokens: int, sequences: int, max_q: int, max_k: int) -> FlashMetadata:
        """Splits a device tensor that `pack_metadata` made."""
        sizes = [tokens, sequences + 1, sequences + 1, sequences]
        slots, cu_seq_q, cu_seq_k, seqused_k, table = torch.split(packed, [*sizes, len(packed) - sum(sizes)])
        return cls(slots.long(), cu_seq_q, cu_seq_k, seqused_k, table.view(sequences, -1), max_q, max_k)

    def leading(self, sequences: int, tokens: int) -> FlashMetadata:
        """The metadata of the first `sequences` sequences, which have `tokens` new tokens."""
        return FlashMetadata(
            self.slot_mapping[:tokens],
            self.cu_seq_q[: sequences + 1],
            self.cu_seq_k[: sequences + 1],
            self.seqused_k[:sequences],
            self.block_table[:sequences],
            self.max_q,
            self.max_k,
        )


class FlashAttention:
    """The `BatchAttention` of a batch on a GPU."""

    paged_kv = None

    def __init__(self, store: KVStore, kernel: VarlenKernel, lengths: Sequenced[int], metadata: FlashMetadata) -> None:
        """`lengths` are the segments' numbers of new tokens."""
        self._store, self._kernel = store, kernel
        self._lengths, self._metadata = lengths, metadata

    @classmethod
    def of_spans(cls, store: KVStore, kernel: VarlenKernel, spans: Sequenced[Span]) -> FlashAttention:
        """Sends the metadata of packed segments to the store's device."""
        lengths = [span.length for span in spans]
        packed = to_device_async(pack_metadata(spans, store.block_tokens), store.kv.device)
        max_k = max(span.end for span in spans)
        return cls(store, kernel, lengths, FlashMetadata.unpack(packed, sum(lengths), len(spans), max(lengths), max_k))

    def leading(self, segments: int) -> FlashAttention:
        """Attention for the first `segments` segments alone."""
        lengths = self._lengths[:segments]
        return FlashAttention(self._store, self._kernel, lengths, self._metadata.leading(segments, sum(lengths)))

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `stitch_server.attention.Attend` defines."""
        metadata = self._metadata
        self._store.write(layer, metadata.slot_mapping, key, value)
        keys, values = self._store.paged(layer)
        attended = self._kernel(
            query,
            keys,
            values,
            metadata.cu_seq_q,
            # The signature requires it; the kernel reads `seqused_k` instead.
            metadata.cu_seq_k,
            metadata.max_q,
            metadata.max_k,
            scale=scale,
            # How many tokens to the left and right of its own a token sees; -1: all.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=metadata.seqused_k,
            block_table=metadata.block_table,
            num_splits=NUM_SPLITS,
        )
        return cast(Tensor, attended).flatten(1)
