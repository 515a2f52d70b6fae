"""How many tokens' KV fit a shard. Loads nothing and allocates nothing."""

from __future__ import annotations

import os

import torch

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS

# Of what is free once the weights are loaded; the rest is for activations, and on a processor for everybody else.
GPU_SHARE = 0.9
PROCESSOR_SHARE = 0.25
# More helps nobody: so many sessions of a full context decode at once at the most.
MOST_CONTEXTS = 64


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers for one token."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize


def kv_tokens(
    configured: int,
    bytes_per_token: int,
    context_length: int,
    device: torch.device,
    weight_bytes: int = 0,
    memory_bytes: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """Tokens for which a shard keeps KV: as configured, or planned from `memory_bytes`; None: what is free now.

    `weight_bytes`: weights that are still to be loaded. Always a whole number of blocks, and at least one.
    """
    if configured:
        tokens = configured
    else:
        share = GPU_SHARE if device.type == "cuda" else PROCESSOR_SHARE
        free = free_bytes(device) if memory_bytes is None else memory_bytes
        room = max(0, free - weight_bytes)
        tokens = min(int(room * share) // bytes_per_token, MOST_CONTEXTS * context_length)
    return max(1, tokens // block_tokens) * block_tokens


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device` now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
