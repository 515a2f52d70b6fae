"""What one shard holds of a pair, read from the models' folders. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stitch.cluster import ClusterConfig, ComputeConfig, RouteConfig, ShardConfig
from stitch.environment import cache_folder
from stitch.v1 import inference_pb2
from stitch_server.attention import AttentionBackend, backend_for
from stitch_server.attention.flash import PAGE_TOKENS, varlen_kernel_for
from stitch_server.engine.types import LayerRange
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, blocks_for
from stitch_server.kv_cache.store import KVStore
from stitch_server.kv_sizing import kv_bytes_per_token, kv_tokens
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.probe import Probe
from stitch_server.model.stitch import Stitch
from stitch_server.model.tokenizer_hash import token_count, tokenizer_hash
from stitch_server.model.weights import WeightFormat
from stitch_server.sources.resolve import resolve
from stitch_server.worker.cuda_graphs import DecodeGraphs, capture_for


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """What a shard holds of the pair, in memory."""

    folder: Path
    model: ModelDescription
    decoder: DecoderLayers
    embedding: Embedding | None
    head: Head | None
    # By the name of the route that enters the top model here; None: bottom and top are one model.
    stitches: dict[str, Stitch | None]
    # By the name of the route whose stitch adapts layers of the top model here, wherever the route enters it.
    adapters: dict[str, Adapters]
    # Of the stitches that are held here, in whole or in part.
    fingerprints: dict[str, str]
    layer_ranges: dict[str, LayerRange]
    tokenizer: str
    count: ParameterCount
    # On the first shard, where the cluster file names one.
    probe: Probe | None = None

    def describe(self, route: RouteConfig) -> inference_pb2.RouteDescription:
        """A route that passes here: the stitch where it is held, and the parameters that are read here."""
        stitch, adapters, cut = (
            self.stitches.get(route.name),
            self.adapters.get(route.name),
            self.layer_ranges[route.name],
        )
        parameters = self.count.between(cut.first, cut.end)
        parameters += 0 if stitch is None else stitch.weight.numel() + stitch.bias.numel()
        parameters += 0 if adapters is None else adapters.parameters
        parameters += 0 if self.head is None else self.count.head
        return inference_pb2.RouteDescription(
            name=route.name,
            bottom_layers=route.bottom_layers,
            top_from=route.top_from,
            stitch=self.fingerprints.get(route.name, ""),
            parameters=parameters,
        )


def load_stage(cluster: ClusterConfig, place: ShardConfig, device: torch.device) -> LoadedStage:
    """Reads a shard's own tensors. Raises Incompatible where files do not fit the cluster file."""
    source = cluster.models.bottom if place.role == "bottom" else cluster.models.top
    folder = resolve(cluster.model_source(place.role), cache_folder())
    model = ModelDescription.read(folder, source.id)
    dtype, weight_format = getattr(torch, cluster.compute.dtype), WeightFormat.of(cluster.compute)
    first, end = place.layers
    decoder = DecoderLayers.load(folder, first, end, device, dtype, weight_format)
    tokenizer = tokenizer_hash(folder)
    cuts = {route.name: cut for route in cluster.routes if (cut := layer_range_of(route, place)) is not None}
    passed = {
        route.name: _stitch(cluster, route, model, tokenizer, device, dtype)
        for route in cluster.routes
        if place.role == "top" and route.name in cuts
    }
    entered = {route.name for route in cluster.routes if first <= route.top_from < end}
    beside = {name: _adapters(stitch, place) for name, stitch in passed.items()}
    adapters = {name: found for name, found in beside.items() if found is not None}
    is_last = (place.role, end) == ("top", model.layers)
    return LoadedStage(
        folder=folder,
        model=model,
        decoder=decoder,
        embedding=Embedding.load(folder, device, dtype) if (place.role, first) == ("bottom", 0) else None,
        head=Head.load(folder, device, dtype, token_count(folder), weight_format) if is_last else None,
        stitches={name: stitch for name, stitch in passed.items() if name in entered},
        adapters=adapters,
        fingerprints={
            name: stitch.fingerprint
            for name, stitch in passed.items()
            if stitch is not None and (name in entered or name in adapters)
        },
        layer_ranges=cuts,
        tokenizer=tokenizer,
        count=ParameterCount.read(folder),
        probe=_probe(cluster, model, tokenizer, device) if (place.role, first) == ("bottom", 0) else None,
    )


@dataclass(frozen=True, slots=True)
class KVCache:
    """The KV cache of a loaded stage: its blocks, the attention over them, and on a GPU the CUDA graphs over both."""

    pool: BlockPool
    store: KVStore
    attention: AttentionBackend
    graphs: DecodeGraphs | None


def allocate_kv_cache(
    compute: ComputeConfig, decoder: DecoderLayers, context_length: int, device: torch.device
) -> KVCache:
    """Sizes the KV cache of `decoder`'s layers, whose weights are already loaded, and allocates it."""
    dtype: torch.dtype = getattr(torch, compute.dtype)
    shape = decoder.kv_heads, decoder.head_dim
    kernel = varlen_kernel_for(device, dtype, decoder.head_dim)
    block_tokens = compute.kv_block_tokens or (BLOCK_TOKENS if kernel is None else PAGE_TOKENS)
    if block_tokens % PAGE_TOKENS:
        kernel = None
    token_bytes = kv_bytes_per_token(decoder.end - decoder.first, *shape, dtype)
    tokens = kv_tokens(compute.kv_tokens, token_bytes, context_length, device, block_tokens=block_tokens)
    pool = BlockPool(tokens // block_tokens, block_tokens)
    # One block that the pool never hands out, into which the padding of CUDA graphs writes.
    blocks = pool.blocks + (kernel is not None)
    store = KVStore(decoder.first, decoder.end, blocks, *shape, device, dtype, block_tokens)
    attention, capture = backend_for(store, kernel), capture_for(device)
    if kernel is None or capture is None or not (compute.captured_decode and decoder.is_native):
        return KVCache(pool, store, attention, None)
    max_blocks = min(pool.blocks, blocks_for(context_length, block_tokens))
    return KVCache(pool, store, attention, DecodeGraphs(decoder, store, kernel, max_blocks, capture))


def layer_range_of(route: RouteConfig, place: ShardConfig) -> LayerRange | None:
    """The layers of a shard that a route passes; None where it passes none."""
    first, end = place.layers
    if place.role == "bottom":
        end = min(end, route.bottom_layers)
    else:
        first = max(first, route.top_from)
    return LayerRange(first, end) if first < end else None


def _stitch(
    cluster: ClusterConfig,
    route: RouteConfig,
    top: ModelDescription,
    tokenizer: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Stitch | None:
    path = cluster.stitch_file(route)
    if path is None:
        return None
    stitch = Stitch.load(path, device, dtype)
    stitch.check_cut(route.bottom_layers, route.top_from)
    stitch.check_models(top=top.to_proto())
    stitch.check_tokenizer(tokenizer)
    stitch.check_depth(top.layers)
    return stitch


def _adapters(stitch: Stitch | None, place: ShardConfig) -> Adapters | None:
    """Those of the layers that lie here."""
    return None if stitch is None or stitch.adapters is None else stitch.adapters.between(*place.layers)


def _probe(cluster: ClusterConfig, bottom: ModelDescription, tokenizer: str, device: torch.device) -> Probe | None:
    if (path := cluster.probe_file) is None:
        return None
    probe = Probe.load(path, device)
    probe.check(bottom, cluster.earliest_cut, [route.name for route in cluster.routes], tokenizer)
    return probe
