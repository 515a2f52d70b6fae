"""What each shard of a cluster will take: weights, KV, link. Loads no weights; a model's files must be here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stitch.cluster import ClusterConfig, ShardConfig
from stitch.environment import cache_folder
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_sizing import kv_bytes_per_token, kv_tokens
from stitch_server.model import llama
from stitch_server.model.counting import ParameterCount
from stitch_server.model.description import ModelDescription, read_config
from stitch_server.model.linear import WeightFormat
from stitch_server.rpc.tensors import bytes_per_token
from stitch_server.sources.resolve import resolve

SESSION_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Sizes in bytes, capacities in tokens."""

    shard: str
    layers: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    # Hidden states of one token on the link to the next shard; 0 behind the last one.
    link_bytes_per_token: int

    @property
    def sessions(self) -> int:
        """Sessions of 1,024 tokens whose KV fits."""
        return self.kv_tokens // SESSION_TOKENS


def plan(cluster: ClusterConfig, device: torch.device, memory_bytes: int | None = None) -> list[ShardPlan]:
    """One plan a shard, for `memory_bytes` on each device; None: what is free on this machine's `device` now."""
    return [_plan_of(cluster, place, device, memory_bytes) for place in cluster.shards]


def table(plans: list[ShardPlan]) -> str:
    """The plans for a person to read."""
    head = (
        f"{'shard':<12} {'layers':<16} {'weights':>10} {'KV a token':>12} "
        f"{'KV tokens':>11} {'sessions':>9} {'link':>14}"
    )
    rows = [
        f"{one.shard:<12} {one.layers:<16} {one.weight_bytes / 1e9:>7.2f} GB {one.kv_bytes_per_token:>10,} B "
        f"{one.kv_tokens:>11,} {one.sessions:>9,} {one.link_bytes_per_token:>6,} B/token"
        for one in plans
    ]
    return "\n".join([head, *rows, f"sessions: of {SESSION_TOKENS:,} tokens each, all at once"])


def _plan_of(cluster: ClusterConfig, place: ShardConfig, device: torch.device, memory_bytes: int | None) -> ShardPlan:
    source = cluster.models.bottom if place.role == "bottom" else cluster.models.top
    folder = resolve(cluster.model_source(place.role), cache_folder())
    model, count = ModelDescription.read(folder, source.id), ParameterCount.read(folder)
    dtype: torch.dtype = getattr(torch, cluster.compute.dtype)
    first, end = place.layers
    last = place.role == "top" and end == model.layers
    ends = place.role == "bottom" and first == 0
    layers, head = count.between(first, end), count.head if last else 0
    token_bytes = kv_bytes_per_token(end - first, model.kv_heads, model.head_dim, dtype)
    weight_format = WeightFormat.of(cluster.compute)
    of_layers, for_head = layers * weight_format.bits(dtype) // 8, head * weight_format.for_head.bits(dtype) // 8
    weights = of_layers + for_head
    # Layers that come from `transformers` multiply in their own way.
    if weight_format.keeps_twice(device, dtype) and llama.supports(read_config(folder)):
        weights += of_layers
    if weight_format.for_head.keeps_twice(device, dtype):
        weights += for_head
    # The embedding's rows are looked up, not multiplied by.
    weights += count.head * dtype.itemsize if ends else 0
    compute, block_tokens = cluster.compute, cluster.compute.kv_block_tokens or BLOCK_TOKENS
    tokens = kv_tokens(
        compute.kv_tokens, token_bytes, model.context_length, device, weights, memory_bytes, block_tokens
    )
    link = 0 if last else bytes_per_token(model.hidden_size, cluster.compute.wire_dtype)
    return ShardPlan(place.name, f"{place.role} {first} to {end - 1}", weights, token_bytes, tokens, link)
