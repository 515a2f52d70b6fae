"""One shard put together: its engine is built around a loaded stage. Loads nothing, listens nowhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, ShardConfig
from stitch.thresholds import FixedThresholds, ReloadingThresholds, ThresholdSource
from stitch.tls import is_loopback
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.build import LoadedStage, allocate_kv_cache
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import Downstream, StepsInFlight
from stitch_server.engine.loop import Engine
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.scheduler import Limits
from stitch_server.engine.session_table import SessionTable
from stitch_server.engine.types import Batch
from stitch_server.kv_cache.block_pool import BlockPool
from stitch_server.metrics import Metrics, PassObserver
from stitch_server.model.probe import MOST_TOKENS
from stitch_server.rpc.tensors import DTYPES, Packed, unpack
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import ParallelismTuner
from stitch_server.worker.route_probe import RouteProbe

# Sessions that may decode in one step beside its prompts.
MOST_DECODING = 4096
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


@dataclass(slots=True, kw_only=True)
class Shard:
    """A loaded shard with its engine; `rpc` serves it."""

    cluster: ClusterConfig
    config: ShardConfig
    loaded: LoadedStage
    identity: shard_pb2.ShardIdentity
    metrics: Metrics
    engine: Engine
    front: FirstStage | NextStage
    pool: BlockPool
    device: torch.device
    # Rows that a neighbour may send in one step.
    max_step_tokens: int

    @property
    def kv_free_tokens(self) -> int:
        return self.pool.free_blocks * self.pool.block_tokens

    @property
    def tokenizer_files(self) -> list[Path]:
        return [path for name in TOKENIZER_FILES if (path := self.loaded.folder / name).is_file()]

    def incoming_width(self, caller_role: str) -> int:
        """The hidden size that a caller of this role sends."""
        widths = [stitch.binding.bottom_hidden for stitch in self.loaded.stitches.values() if stitch is not None]
        return widths[0] if caller_role != self.config.role and widths else self.loaded.model.hidden_size

    def unpack(self, rows: Packed) -> Tensor:
        """What a neighbour sent, as this shard computes with it; runs in the engine's thread."""
        return unpack(rows, self.device, getattr(torch, self.cluster.compute.dtype))

    def check_stitch(self, route: str, bottom: inference_pb2.Model) -> None:
        """Incompatible where the route's stitch was not made for this bottom model."""
        stitch = self.loaded.stitches.get(route)
        if stitch is not None:
            stitch.check_models(bottom=bottom)


def build_shard(
    cluster: ClusterConfig,
    config: ShardConfig,
    loaded: LoadedStage,
    device: torch.device,
    links: Downstream,
    metrics: Metrics,
    step_log: PassObserver | None = None,
) -> Shard:
    """Puts cache, runner, front and engine around the loaded stage; nothing runs yet."""
    compute = cluster.compute
    kv_cache = allocate_kv_cache(compute, loaded.decoder, loaded.model.context_length, device)
    pool = kv_cache.pool
    cores = len(os.sched_getaffinity(0))
    alone = compute.threads or cores
    runner = ModelRunner(
        decoder=loaded.decoder,
        attention=kv_cache.attention,
        device=device,
        tuner=ParallelismTuner(alone, compute.threads_while_pipelined or alone),
        embed=loaded.embedding,
        stage=f"{config.role}_prefill",
        stitches={route: stitch for route, stitch in loaded.stitches.items() if stitch is not None},
        adapters=loaded.adapters,
        head=loaded.head,
        probe=_route_probe(cluster, loaded),
        layer_ranges=loaded.layer_ranges,
        graphs=kv_cache.graphs,
        synchronize=partial(torch.cuda.synchronize, device) if device.type == "cuda" else None,
    )
    front = _front(cluster, loaded, pool, links, device)
    prompt_tokens = compute.prefill_tokens * compute.prompts_together

    def observe(batch: Batch, started: float, ended: float) -> None:
        metrics.batch_tokens.observe(batch.num_tokens)
        if step_log is not None:
            step_log(batch, started, ended)

    engine = Engine(front, runner, observe)
    _read(metrics, front, pool, runner)
    return Shard(
        cluster=cluster,
        config=config,
        loaded=loaded,
        identity=_identity(cluster, config, loaded, pool, device),
        metrics=metrics,
        engine=engine,
        front=front,
        pool=pool,
        device=device,
        max_step_tokens=max(compute.batch_tokens, prompt_tokens, MOST_TOKENS) + MOST_DECODING,
    )


def _route_probe(cluster: ClusterConfig, loaded: LoadedStage) -> RouteProbe | None:
    """Raises InvalidRequest where the thresholds are another probe's."""
    probe, file = loaded.probe, cluster.probe_thresholds_file
    if probe is None:
        return None
    thresholds: ThresholdSource = FixedThresholds(probe.thresholds)
    if file is not None:
        thresholds = ReloadingThresholds(file, probe.fingerprint, len(probe.binding.routes))
    return RouteProbe(probe, thresholds, cluster.gateway.fallback_route)


def _front(
    cluster: ClusterConfig, loaded: LoadedStage, pool: BlockPool, links: Downstream, device: torch.device
) -> FirstStage | NextStage:
    compute = cluster.compute
    if loaded.embedding is not None:
        limits = Limits(
            prefill_tokens=compute.prefill_tokens,
            prompts_together=compute.prompts_together,
            min_efficient_tokens=loaded.decoder.min_efficient_tokens,
            prefill_tokens_beside_decode=compute.prefill_tokens_beside_decode,
            attention_cost_per_token=loaded.decoder.attention_cost_per_token,
            groups=compute.groups or (1 if _share_cores(cluster, device) else 2),
            max_waiting_sessions=compute.max_waiting_sessions,
            probe_tokens=0 if loaded.probe is None else loaded.probe.binding.tokens,
        )
        return FirstStage(pool, loaded.layer_ranges, limits, StepsInFlight(links))
    forwarding = None if loaded.head is not None else StepsInFlight(links)
    intake = SessionTable(pool, loaded.layer_ranges, forwarding)
    return NextStage(pool, intake, forwarding, compute.batch_tokens)


def _share_cores(cluster: ClusterConfig, device: torch.device) -> bool:
    """Whether all shards compute on all cores of this machine's processor, so that each slows the others down."""
    compute, hosts = cluster.compute, [shard.address.rpartition(":")[0] for shard in cluster.shards]
    return (
        device.type == "cpu"
        and compute.threads == compute.threads_while_pipelined == 0
        and all(map(is_loopback, hosts))
    )


def _read(metrics: Metrics, front: FirstStage | NextStage, pool: BlockPool, runner: ModelRunner) -> None:
    about = "The share of KV blocks that sessions hold; blocks kept only for their prefix count as free."
    metrics.read_gauge("stitch_kv_cache_usage_ratio", about, lambda: pool.usage)
    metrics.read_gauge(
        "stitch_sessions_running", "Sessions that hold KV blocks on this shard.", lambda: front.running_sessions
    )
    metrics.read_gauge(
        "stitch_sessions_waiting", "Sessions admitted that hold no KV blocks yet.", lambda: front.waiting_sessions
    )
    metrics.read_counter("stitch_busy_seconds", "Time spent in forward passes.", lambda: runner.busy_seconds)
    metrics.read_counter(
        "stitch_prefix_tokens_asked", "Prompt tokens looked up in the prefix cache.", lambda: pool.queried_tokens
    )
    metrics.read_counter(
        "stitch_prefix_tokens_reused", "Prompt tokens found in the prefix cache.", lambda: pool.reused_tokens
    )


def _identity(
    cluster: ClusterConfig, config: ShardConfig, loaded: LoadedStage, pool: BlockPool, device: torch.device
) -> shard_pb2.ShardIdentity:
    identity = shard_pb2.ShardIdentity(
        shard=config.name,
        role=config.role,
        first_layer=config.layers[0],
        end_layer=config.layers[1],
        tokenizer=loaded.tokenizer,
        wire_dtype=DTYPES[cluster.compute.wire_dtype][0],
        kv_capacity_tokens=pool.tokens,
        kv_block_tokens=pool.block_tokens,
        device=str(device),
        compute_dtype=cluster.compute.dtype,
        probe="" if loaded.probe is None else loaded.probe.fingerprint,
        quantization=cluster.compute.quantization,
    )
    (identity.bottom if config.role == "bottom" else identity.top).CopyFrom(loaded.model.to_proto())
    identity.routes.extend(loaded.describe(route) for route in cluster.routes if route.name in loaded.layer_ranges)
    return identity
