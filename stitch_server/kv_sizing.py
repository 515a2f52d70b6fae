"""From free memory to KV tokens, and the sizes that `stitch-server plan` prints.

`kv_tokens` gives the capacity of a shard's KV cache: as configured, or a share of the memory that its weights leave.
`plan` computes for every shard of a cluster what weights, KV cache and link take, from the models' configuration files
alone. Bytes and tokens are what a loaded shard has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from stitch.cluster import ClusterConfig, ComputeConfig, ShardConfig
from stitch.environment import cache_folder
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.model.description import ModelDescription, ParameterCount, read_config
from stitch_server.model.llama_config import LlamaConfig
from stitch_server.model.weights import WeightFormat
from stitch_server.rpc.tensors import bytes_per_token
from stitch_server.sources.resolve import resolve

# Of the memory that is free once the weights are loaded; the rest is for activations, and on a CPU for other processes.
GPU_SHARE = 0.9
CPU_SHARE = 0.25
# The KV of this many full contexts is the most that is planned: more sessions hardly decode at once.
MAX_CONTEXTS = 64
# The length of a session in the table of `plan`.
SESSION_TOKENS = 1024


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
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
    """The capacity of a KV cache in tokens: `configured`, or if that is 0, a share of `memory_bytes`.

    By default `memory_bytes` is what is free on `device` now. `weight_bytes` are those of weights that are not loaded
    yet. The result is a positive multiple of `block_tokens`.
    """
    if configured:
        tokens = configured
    else:
        share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
        free = free_bytes(device) if memory_bytes is None else memory_bytes
        available = max(0, free - weight_bytes)
        tokens = min(int(available * share) // bytes_per_token, MAX_CONTEXTS * context_length)
    return max(1, tokens // block_tokens) * block_tokens


def kv_tokens_beside_states(
    compute: ComputeConfig,
    bytes_per_token: int,
    state_bytes_per_token: int,
    context_length: int,
    device: torch.device,
    weight_bytes: int = 0,
    memory_bytes: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """`kv_tokens` of what hidden states leave, which take `state_bytes_per_token`, and no more than they may in all."""

    def tokens(each: int, taken: int) -> int:
        return kv_tokens(compute.kv_tokens, each, context_length, device, taken, memory_bytes, block_tokens)

    most = compute.state_cache_bytes if state_bytes_per_token else 0
    return max(
        tokens(bytes_per_token + state_bytes_per_token, weight_bytes), tokens(bytes_per_token, weight_bytes + most)
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device` now."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What one shard takes: sizes in bytes, capacities in tokens."""

    shard: str
    layers: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    # One token's hidden states on the link to the next shard; 0 for the last shard.
    link_bytes_per_token: int

    @property
    def sessions(self) -> int:
        """The number of sessions of `SESSION_TOKENS` tokens whose KV fits."""
        return self.kv_tokens // SESSION_TOKENS


def plan(cluster: ClusterConfig, device: torch.device, memory_bytes: int | None = None) -> list[ShardPlan]:
    """One plan a shard, for `memory_bytes` on each device; by default what is free on this machine's `device` now."""
    return [_plan_of(cluster, config, device, memory_bytes) for config in cluster.shards]


def table(plans: list[ShardPlan]) -> str:
    """The plans as the text that `stitch-server plan` prints."""
    head = (
        f"{'shard':<12} {'layers':<16} {'weights':>10} {'KV a token':>12} "
        f"{'KV tokens':>11} {'sessions':>9} {'link':>14}"
    )
    rows = [
        f"{one.shard:<12} {one.layers:<16} {one.weight_bytes / 1e9:>7.2f} GB {one.kv_bytes_per_token:>10,} B "
        f"{one.kv_tokens:>11,} {one.sessions:>9,} {one.link_bytes_per_token:>6,} B/token"
        for one in plans
    ]
    return "\n".join([head, *rows, f"sessions: concurrent sessions of {SESSION_TOKENS:,} tokens each"])


def _plan_of(cluster: ClusterConfig, config: ShardConfig, device: torch.device, memory_bytes: int | None) -> ShardPlan:
    source = cluster.models.bottom if config.role == "bottom" else cluster.models.top
    folder = resolve(cluster.model_source(config.role), cache_folder())
    model, compute = ModelDescription.read(folder, source.id), cluster.compute
    dtype: torch.dtype = getattr(torch, compute.dtype)
    first, end = config.layers
    is_last = bool(cluster.ending_on(config.stage))
    is_native = isinstance(read_config(folder), LlamaConfig)
    weights = _weight_bytes(cluster, config, ParameterCount.read(folder), device, is_last, is_native)
    token_bytes = kv_bytes_per_token(end - first, model.kv_heads, model.head_dim, dtype)
    block_tokens = compute.kv_block_tokens or BLOCK_TOKENS
    going_on = cluster.passing(config.stage) - cluster.ending_on(config.stage)
    # Hidden states are kept after each layer from which the bottom's routes go on.
    cuts = {min(end, cluster.route(name).bottom_layers) for name in going_on} if config.role == "bottom" else ()
    state_bytes = len(cuts) * model.hidden_size * dtype.itemsize
    tokens = kv_tokens_beside_states(
        compute, token_bytes, state_bytes, model.context_length, device, weights, memory_bytes, block_tokens
    )
    link = bytes_per_token(model.hidden_size, compute.wire_dtype) if going_on else 0
    return ShardPlan(config.name, f"{config.role} {first} to {end - 1}", weights, token_bytes, tokens, link)


def _weight_bytes(
    cluster: ClusterConfig,
    config: ShardConfig,
    count: ParameterCount,
    device: torch.device,
    is_last: bool,
    is_native: bool,
) -> int:
    dtype: torch.dtype = getattr(torch, cluster.compute.dtype)
    weight_format = WeightFormat.of(cluster.compute)
    of_layers = count.between(*config.layers) * weight_format.bits(dtype) // 8
    of_head = count.head * weight_format.for_head.bits(dtype) // 8 if is_last else 0
    # The kernels of layers that come from `transformers` keep no second copy.
    layer_copies = 2 if weight_format.keeps_two_layouts(device, dtype) and is_native else 1
    head_copies = 2 if weight_format.for_head.keeps_two_layouts(device, dtype) else 1
    # The embedding is looked up and not multiplied by, so it keeps its dtype.
    of_embedding = count.head * dtype.itemsize if cluster.beginning_on(config.stage) else 0
    return layer_copies * of_layers + head_copies * of_head + of_embedding
