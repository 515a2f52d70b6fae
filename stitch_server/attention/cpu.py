"""Attention by compiled CPU kernels, which read each sequence's keys and values in their blocks.

`compiled_backend` takes a `KVStore` on a CPU and returns its back end. Unlike SDPA, the kernels need no gathered copy
of a context and no padding, and the threads of the pool share one call's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from stitch_server.cpu import Numbers, PagedKV, attend_shared, has_amx, slot_mapping, store_all_kv
from stitch_server.devices import as_bits, as_float32, run_on_thread_pool
from stitch_server.kv_cache.store import KVStore, Span


class CompiledAttention:
    """The `BatchAttention` of a batch on a CPU."""

    def __init__(self, kv: Numbers, first_layer: int, block_tokens: int, spans: Sequence[Span]) -> None:
        """`kv` holds all layers from `first_layer` on, as in `PagedKV`."""
        self._kv, self._first_layer, self._block_tokens, self._spans = kv, first_layer, block_tokens, spans
        self.paged_kv = self._map_slots()

    def leading(self, segments: int) -> CompiledAttention:
        """Attention for the first `segments` segments alone."""
        return CompiledAttention(self._kv, self._first_layer, self._block_tokens, self._spans[:segments])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """As `stitch_server.attention.Attend` defines."""
        kv = self.paged_kv.kv[layer - self._first_layer]
        store_all_kv(as_float32(torch.cat([key, value], dim=1)), kv, self.paged_kv)
        queries, attended = as_float32(query), np.empty(query.shape, np.float32)
        attend = partial(attend_shared, queries, self.paged_kv, kv, window or 0, scale, attended, has_amx())
        run_on_thread_pool(attend)
        return torch.from_numpy(attended).flatten(1).to(query.dtype)

    def _map_slots(self) -> PagedKV:
        lengths = np.array([(span.end, span.length) for span in self._spans], np.int64).reshape(-1, 2)
        used = [span.blocks[: -(-span.end // self._block_tokens)] for span in self._spans]
        blocks = np.array([block for one in used for block in one], np.int64)
        return PagedKV(self._first_layer, self._kv, *slot_mapping(lengths, blocks, self._block_tokens))


def compiled_backend(store: KVStore) -> Callable[[Sequence[Span]], CompiledAttention]:
    """The back end over `store`. Compiles its kernels first, so that the first token doesn't wait for the compiler."""
    _, _, kv_heads_twice, head_dim = store.kv.shape
    _compile_kernels(store.kv.dtype, kv_heads_twice // 2, head_dim)
    return partial(CompiledAttention, as_bits(store.kv), store.first, store.block_tokens)


@cache
def _compile_kernels(dtype: torch.dtype, kv_heads: int, head_dim: int) -> None:
    """Attends once over a cache of one token."""
    row, kv = torch.zeros(1, kv_heads, head_dim), torch.zeros(1, 1, 2 * kv_heads, head_dim, dtype=dtype)
    CompiledAttention(as_bits(kv), 0, 1, [Span(0, 1, [0])])(0, row, row, row, 1.0, None)
