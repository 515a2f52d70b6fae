"""Loads what one shard holds of a pair, and wires it for forward passes.

`load_stage` reads a shard's own layers, stitches and adapters from the models' folders, and refuses files that do not
fit the cluster file. `allocate_kv_cache` gives the loaded layers a KV cache of the size and form that suit the device,
and `build_runner` wires both into the shard's `ModelRunner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from stitch import tokenizer_files
from stitch.cluster import ClusterConfig, ComputeConfig, RouteConfig, ShardConfig
from stitch.environment import available_cpus, cache_folder
from stitch.errors import Incompatible
from stitch.thresholds import FixedThresholds, ReloadingThresholds, ThresholdSource
from stitch.tokenizer_files import token_count, tokenizer_hash
from stitch.v1 import inference_pb2
from stitch_server.attention import AttentionBackend, backend_for
from stitch_server.attention.flash import PAGE_TOKENS, varlen_kernel_for
from stitch_server.engine.types import LayerRange
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool, blocks_for
from stitch_server.kv_cache.hidden_states import HiddenStateCache
from stitch_server.kv_cache.store import KVStore
from stitch_server.kv_sizing import kv_bytes_per_token, kv_tokens_beside_states
from stitch_server.model.adapters import Adapters
from stitch_server.model.decoder import DecoderLayers
from stitch_server.model.description import ModelDescription, ParameterCount
from stitch_server.model.embedding_and_head import Embedding, Head
from stitch_server.model.ffn_skip import FfnGates, FfnSkip
from stitch_server.model.probe import Probe
from stitch_server.model.stitch import Stitch
from stitch_server.model.weights import WeightFormat
from stitch_server.sources.resolve import resolve
from stitch_server.worker.cuda_graphs import DecodeGraphs, capture_for
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from stitch_server.worker.route_probe import RouteProbe


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A shard's weights in memory, with the routes that they serve."""

    folder: Path
    model: ModelDescription
    decoder: DecoderLayers
    # Where routes begin, and where they end.
    embedding: Embedding | None
    head: Head | None
    # By route that enters the top model on this shard; None: bottom and top are one model.
    stitches: dict[str, Stitch | None]
    # By route whose stitch adapts layers on this shard, whichever shard it enters the top model on.
    adapters: dict[str, Adapters]
    # By route whose generated tokens leave out FFNs; those of this shard's layers, which may be none.
    ffn_skips: dict[str, FfnSkip]
    # By route, of the stitches in `stitches` and `adapters`.
    fingerprints: dict[str, str]
    # By route that passes this shard.
    layer_ranges: dict[str, LayerRange]
    tokenizer: str
    count: ParameterCount
    # The routes that end with the head on this shard.
    ending: frozenset[str] = frozenset()
    # On a bottom shard: the layers after which routes go on to a next shard.
    cuts: tuple[int, ...] = ()
    # On the bottom's first shard, if the cluster file names one.
    probe: Probe | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a route goes on from this shard to a next one."""
        return bool(self.layer_ranges.keys() - self.ending)

    def describe(self, route: RouteConfig) -> inference_pb2.RouteDescription:
        """A route that passes this shard, with the parameters that its tokens read here."""
        stitch, adapters = self.stitches.get(route.name), self.adapters.get(route.name)
        layers = self.layer_ranges[route.name]
        parameters = self.count.between(layers.first, layers.end)
        parameters += 0 if stitch is None else stitch.weight.numel() + stitch.bias.numel()
        parameters += 0 if adapters is None else adapters.parameters
        parameters += self.count.head if route.name in self.ending else 0
        skip = self.ffn_skips.get(route.name)
        parameters -= 0 if skip is None else skip.saved_parameters(self.count)
        return inference_pb2.RouteDescription(
            name=route.name,
            bottom_layers=route.bottom_layers,
            top_from=route.top_from,
            stitch=self.fingerprints.get(route.name, ""),
            parameters=parameters,
            ffn_skip="" if skip is None else skip.fingerprint,
        )


def load_stage(cluster: ClusterConfig, config: ShardConfig, device: torch.device) -> LoadedStage:
    """Reads the tensors of one shard. Raises Incompatible if files do not fit the cluster file."""
    source = cluster.models.bottom if config.role == "bottom" else cluster.models.top
    folder = resolve(cluster.model_source(config.role), cache_folder())
    beginning, ending = cluster.beginning_on(config.stage), cluster.ending_on(config.stage)
    if beginning:
        tokenizer_files.check(folder)
    model = ModelDescription.read(folder, source.id)
    dtype, weight_format = getattr(torch, cluster.compute.dtype), WeightFormat.of(cluster.compute)
    first, end = config.layers
    decoder = DecoderLayers.load(folder, first, end, device, dtype, weight_format)
    tokenizer = tokenizer_hash(folder)
    ranges = {route.name: layer_range_of(route, config) for route in cluster.routes}
    layer_ranges = {name: layers for name, layers in ranges.items() if layers is not None}
    stitches = _load_stitches(cluster, config, layer_ranges, model, tokenizer, device, dtype)
    entering = {one.name for one in cluster.routes if one.joins_models and first <= (one.top_from or 0) < end}
    adapters = _adapters_of(stitches, config)
    if ending and config.layers[1] != model.layers:
        routes, layers = ", ".join(sorted(ending)), f"after layer {config.layers[1]} of {model.layers}"
        raise Incompatible(f"shard {config.name} is the last of route {routes}, but it ends {layers}")
    return LoadedStage(
        folder=folder,
        model=model,
        decoder=decoder,
        embedding=Embedding.load(folder, device, dtype) if beginning else None,
        head=Head.load(folder, device, dtype, token_count(folder), weight_format) if ending else None,
        stitches={name: stitch for name, stitch in stitches.items() if name in entering},
        adapters=adapters,
        ffn_skips=_load_ffn_skips(cluster, config, layer_ranges, model, decoder, device),
        fingerprints={
            name: stitch.fingerprint
            for name, stitch in stitches.items()
            if stitch is not None and (name in entering or name in adapters)
        },
        layer_ranges=layer_ranges,
        tokenizer=tokenizer,
        count=ParameterCount.read(folder),
        ending=ending,
        cuts=_cuts(config, layer_ranges, ending),
        probe=_load_probe(cluster, model, tokenizer, device) if (config.role, first) == ("bottom", 0) else None,
    )


@dataclass(frozen=True, slots=True)
class KVCache:
    """The KV cache of a loaded stage: its blocks, the attention over them, and on a GPU the CUDA graphs over both."""

    pool: BlockPool
    store: KVStore
    attention: AttentionBackend
    graphs: DecodeGraphs | None
    # None where no hidden states are kept.
    states: HiddenStateCache | None = None


def allocate_kv_cache(
    compute: ComputeConfig,
    decoder: DecoderLayers,
    context_length: int,
    device: torch.device,
    cuts: Sequence[int] = (),
) -> KVCache:
    """Sizes the KV cache of `decoder`'s layers, whose weights are already loaded, and allocates it.

    `cuts`: the layers after which hidden states are kept.
    """
    dtype: torch.dtype = getattr(torch, compute.dtype)
    shape = decoder.kv_heads, decoder.head_dim
    kernel = varlen_kernel_for(device, dtype, decoder.head_dim)
    block_tokens = compute.kv_block_tokens or (BLOCK_TOKENS if kernel is None else PAGE_TOKENS)
    if block_tokens % PAGE_TOKENS:
        kernel = None
    token_bytes = kv_bytes_per_token(decoder.end - decoder.first, *shape, dtype)
    state_bytes = len(cuts) * decoder.hidden_size * dtype.itemsize
    tokens = kv_tokens_beside_states(
        compute, token_bytes, state_bytes, context_length, device, block_tokens=block_tokens
    )
    states = _allocate_states(compute, decoder, cuts, tokens // block_tokens, block_tokens, device)
    pool = BlockPool(tokens // block_tokens, block_tokens, states)
    # One block that the pool never hands out, into which the padding of CUDA graphs writes.
    blocks = pool.blocks + (kernel is not None)
    store = KVStore(decoder.first, decoder.end, blocks, *shape, device, dtype, block_tokens)
    attention, capture = backend_for(store, kernel), capture_for(device)
    if kernel is None or capture is None or not (compute.captured_decode and decoder.is_native):
        return KVCache(pool, store, attention, None, states)
    max_blocks = min(pool.blocks, blocks_for(context_length, block_tokens))
    return KVCache(pool, store, attention, DecodeGraphs(decoder, store, kernel, max_blocks, capture), states)


def _allocate_states(
    compute: ComputeConfig,
    decoder: DecoderLayers,
    cuts: Sequence[int],
    blocks: int,
    block_tokens: int,
    device: torch.device,
) -> HiddenStateCache | None:
    """Where hidden states after the layers `cuts` are kept; None where none fit or there are no cuts."""
    dtype: torch.dtype = getattr(torch, compute.dtype)
    if not cuts or compute.state_cache_bytes < block_tokens * decoder.hidden_size * dtype.itemsize:
        return None
    return HiddenStateCache(
        compute.state_cache_bytes, decoder.first, cuts, decoder.hidden_size, device, dtype, blocks, block_tokens
    )


def build_runner(
    cluster: ClusterConfig, config: ShardConfig, loaded: LoadedStage, kv_cache: KVCache, device: torch.device
) -> ModelRunner:
    """The runner of a loaded stage. Raises InvalidRequest if the cluster's thresholds are those of another probe."""
    threads = cluster.compute.threads or available_cpus()
    return ModelRunner(
        decoder=loaded.decoder,
        attention=kv_cache.attention,
        device=device,
        tuner=ParallelismTuner(threads, cluster.compute.threads_while_pipelined or threads),
        embed=loaded.embedding,
        stage=f"{config.role}_prefill",
        stitches={route: stitch for route, stitch in loaded.stitches.items() if stitch is not None},
        adapters=loaded.adapters,
        ffn_skips={route: skip for route, skip in loaded.ffn_skips.items() if skip.first < skip.end},
        head=loaded.head,
        ending=loaded.ending,
        probe=_route_probe(cluster, loaded.probe),
        layer_ranges=loaded.layer_ranges,
        graphs=kv_cache.graphs,
        synchronize=partial(torch.cuda.synchronize, device) if device.type == "cuda" else None,
    )


def _route_probe(cluster: ClusterConfig, probe: Probe | None) -> RouteProbe | None:
    if probe is None:
        return None
    file = cluster.probe_thresholds_file
    thresholds: ThresholdSource = FixedThresholds(probe.thresholds)
    if file is not None:
        thresholds = ReloadingThresholds(file, probe.fingerprint, len(probe.binding.routes))
    return RouteProbe(probe, thresholds, cluster.gateway.fallback_route)


def layer_range_of(route: RouteConfig, config: ShardConfig) -> LayerRange | None:
    """The layers of a shard that a route passes; None if it passes none."""
    first, end = config.layers
    if config.role == "bottom":
        end = min(end, route.bottom_layers)
    elif route.top_from is None:
        return None
    else:
        first = max(first, route.top_from)
    return LayerRange(first, end) if first < end else None


def _cuts(config: ShardConfig, layer_ranges: Mapping[str, LayerRange], ending: frozenset[str]) -> tuple[int, ...]:
    if config.role == "top":
        return ()
    return tuple(sorted({layers.end for name, layers in layer_ranges.items() if name not in ending}))


def _load_stitches(
    cluster: ClusterConfig,
    config: ShardConfig,
    layer_ranges: Mapping[str, LayerRange],
    top: ModelDescription,
    tokenizer: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Stitch | None]:
    """By route that passes this top shard, its stitch, or None if it has none; nothing on a bottom shard."""
    stitches: dict[str, Stitch | None] = {}
    for route in cluster.routes:
        if config.role == "bottom" or route.top_from is None or route.name not in layer_ranges:
            continue
        path = cluster.stitch_file(route)
        stitches[route.name] = None if path is None else Stitch.load(path, device, dtype)
        if (stitch := stitches[route.name]) is not None:
            stitch.check_cut(route.bottom_layers, route.top_from)
            stitch.check_models(top=top.to_proto())
            stitch.check_tokenizer(tokenizer)
            stitch.check_depth(top.layers)
    return stitches


def _adapters_of(stitches: Mapping[str, Stitch | None], config: ShardConfig) -> dict[str, Adapters]:
    """By route, the adapters of its stitch for the layers of this shard."""
    adapters = {
        name: stitch.adapters.between(*config.layers)
        for name, stitch in stitches.items()
        if stitch is not None and stitch.adapters is not None
    }
    return {name: found for name, found in adapters.items() if found is not None}


def _load_ffn_skips(
    cluster: ClusterConfig,
    config: ShardConfig,
    layer_ranges: Mapping[str, LayerRange],
    model: ModelDescription,
    decoder: DecoderLayers,
    device: torch.device,
) -> dict[str, FfnSkip]:
    """By route that passes this shard and leaves out FFNs, its gates of the shard's layers."""
    skips: dict[str, FfnSkip] = {}
    for route in cluster.routes:
        path = cluster.ffn_skip_file(route)
        if path is None or route.ffn_skip is None or route.name not in layer_ranges:
            continue
        if not decoder.is_native:
            raise Incompatible(f"route {route.name} leaves out FFNs, which layers of {model.architecture} can't")
        gates = FfnGates.load(path)
        gates.check_model(model)
        dtype = getattr(torch, cluster.compute.dtype)
        skips[route.name] = gates.at(route.ffn_skip.share).between(*config.layers).to(device, dtype)
    return skips


def _load_probe(cluster: ClusterConfig, bottom: ModelDescription, tokenizer: str, device: torch.device) -> Probe | None:
    if (path := cluster.probe_file) is None:
        return None
    probe = Probe.load(path, device)
    probe.check(bottom, cluster.earliest_cut, [route.name for route in cluster.routes], tokenizer)
    return probe
