"""The KV cache of a shard, as large and of the form that suits its device. Loads no weights and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stitch.cluster import ComputeConfig
from stitch_server.attention.flash import PAGE_TOKENS, kernel_for
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, blocks_for
from stitch_server.kv_cache.store import KVStore
from stitch_server.kv_sizing import kv_bytes_per_token, kv_tokens
from stitch_server.model.decoder import DecoderLayers
from stitch_server.worker.cuda_graphs import DecodeGraphs, capture_for


@dataclass(frozen=True, slots=True)
class Provision:
    """Blocks, who counts them, and on a GPU the passes that are captured over them."""

    pool: BlockPool
    store: KVStore
    graphs: DecodeGraphs | None


def provide(compute: ComputeConfig, decoder: DecoderLayers, context_length: int, device: torch.device) -> Provision:
    """For the layers of `decoder`, whose weights are in memory already."""
    dtype: torch.dtype = getattr(torch, compute.dtype)
    shape = decoder.kv_heads, decoder.head_dim
    kernel = kernel_for(device, dtype, decoder.head_dim)
    block_tokens = compute.kv_block_tokens or (BLOCK_TOKENS if kernel is None else PAGE_TOKENS)
    if block_tokens % PAGE_TOKENS:
        kernel = None
    token_bytes = kv_bytes_per_token(decoder.end - decoder.first, *shape, dtype)
    tokens = kv_tokens(compute.kv_tokens, token_bytes, context_length, device, block_tokens=block_tokens)
    pool = BlockPool(tokens // block_tokens, block_tokens)
    # A block more than the pool knows, for rows that only fill captured passes up.
    blocks = pool.blocks + (kernel is not None)
    store = KVStore(decoder.first, decoder.end, blocks, *shape, device, dtype, block_tokens, kernel)
    capture = capture_for(device)
    if kernel is None or capture is None or not (compute.captured_decode and decoder.is_lean):
        return Provision(pool, store, None)
    longest = min(pool.blocks, blocks_for(context_length, block_tokens))
    return Provision(pool, store, DecodeGraphs(decoder, store, kernel, longest, capture))
