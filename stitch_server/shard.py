"""One shard put together: its engine is built around its part of the pair. Loads nothing, listens nowhere."""

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
from stitch_server.build import Part
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import Downstream, StepsInFlight
from stitch_server.engine.loop import Engine
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.scheduler import Limits
from stitch_server.engine.session_table import SessionTable
from stitch_server.engine.types import Batch
from stitch_server.kv_cache.block_pool import BlockPool
from stitch_server.metrics import Metrics
from stitch_server.model.probe import MOST_TOKENS
from stitch_server.provision import provide
from stitch_server.rpc.tensors import DTYPES, Packed, unpack
from stitch_server.step_log import Observer
from stitch_server.worker.model_runner import ModelRunner
from stitch_server.worker.parallelism import Threads
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
    place: ShardConfig
    part: Part
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
        return [path for name in TOKENIZER_FILES if (path := self.part.folder / name).is_file()]

    def incoming_width(self, caller_role: str) -> int:
        """The hidden size that a caller of this role sends."""
        widths = [stitch.binding.bottom_hidden for stitch in self.part.stitches.values() if stitch is not None]
        return widths[0] if caller_role != self.place.role and widths else self.part.model.hidden_size

    def unpack(self, rows: Packed) -> Tensor:
        """What a neighbour sent, as this shard computes with it; runs in the engine's thread."""
        return unpack(rows, self.device, getattr(torch, self.cluster.compute.dtype))

    def check_stitch(self, route: str, bottom: inference_pb2.Model) -> None:
        """Incompatible where the route's stitch was not made for this bottom model."""
        stitch = self.part.stitches.get(route)
        if stitch is not None:
            stitch.check_models(bottom=bottom)


def build_shard(
    cluster: ClusterConfig,
    place: ShardConfig,
    part: Part,
    device: torch.device,
    links: Downstream,
    metrics: Metrics,
    step_log: Observer | None = None,
) -> Shard:
    """Puts cache, runner, front and engine around the loaded part; nothing runs yet."""
    compute = cluster.compute
    provision = provide(compute, part.decoder, part.model.context_length, device)
    pool = provision.pool
    cores = len(os.sched_getaffinity(0))
    alone = compute.threads or cores
    runner = ModelRunner(
        decoder=part.decoder,
        store=provision.store,
        device=device,
        threads=Threads(alone, compute.threads_while_pipelined or alone),
        embed=part.embedding,
        stage=f"{place.role}_prefill",
        stitches={route: stitch for route, stitch in part.stitches.items() if stitch is not None},
        adapters=part.adapters,
        head=part.head,
        judge=_judge(cluster, part),
        cuts=part.cuts,
        graphs=provision.graphs,
        wait=partial(torch.cuda.synchronize, device) if device.type == "cuda" else None,
    )
    front = _front(cluster, part, pool, links, device)
    prompt_tokens = compute.prefill_tokens * compute.prompts_together

    def observe(batch: Batch, started: float, ended: float) -> None:
        metrics.batch_tokens.observe(batch.tokens)
        if step_log is not None:
            step_log(batch, started, ended)

    engine = Engine(front, runner, observe)
    _read(metrics, front, pool, runner)
    return Shard(
        cluster=cluster,
        place=place,
        part=part,
        identity=_identity(cluster, place, part, pool, device),
        metrics=metrics,
        engine=engine,
        front=front,
        pool=pool,
        device=device,
        max_step_tokens=max(compute.batch_tokens, prompt_tokens, MOST_TOKENS) + MOST_DECODING,
    )


def _judge(cluster: ClusterConfig, part: Part) -> RouteProbe | None:
    """Raises InvalidRequest where the thresholds are another probe's."""
    probe, file = part.probe, cluster.probe_thresholds_file
    if probe is None:
        return None
    thresholds: ThresholdSource = FixedThresholds(probe.thresholds)
    if file is not None:
        thresholds = ReloadingThresholds(file, probe.fingerprint, len(probe.binding.routes))
    return RouteProbe(probe, thresholds, cluster.gateway.fallback_route)


def _front(
    cluster: ClusterConfig, part: Part, pool: BlockPool, links: Downstream, device: torch.device
) -> FirstStage | NextStage:
    compute = cluster.compute
    if part.embedding is not None:
        limits = Limits(
            prefill_tokens=compute.prefill_tokens,
            prompts_together=compute.prompts_together,
            min_efficient_tokens=part.decoder.min_efficient_tokens,
            prefill_tokens_beside_decode=compute.prefill_tokens_beside_decode,
            attention_cost_per_token=part.decoder.attention_cost_per_token,
            groups=compute.groups or (1 if _share_cores(cluster, device) else 2),
            max_waiting_sessions=compute.max_waiting_sessions,
            probe_tokens=0 if part.probe is None else part.probe.binding.tokens,
        )
        return FirstStage(pool, part.cuts, limits, StepsInFlight(links, compute.wire_dtype))
    forwarding = None if part.head is not None else StepsInFlight(links, compute.wire_dtype)
    intake = SessionTable(pool, part.cuts, forwarding)
    return NextStage(pool, intake, forwarding, compute.batch_tokens)


def _share_cores(cluster: ClusterConfig, device: torch.device) -> bool:
    """Whether all shards compute on all cores of this machine's processor, so that each slows the others down."""
    compute, hosts = cluster.compute, [place.address.rpartition(":")[0] for place in cluster.shards]
    return (
        device.type == "cpu"
        and compute.threads == compute.threads_while_pipelined == 0
        and all(map(is_loopback, hosts))
    )


def _read(metrics: Metrics, front: FirstStage | NextStage, pool: BlockPool, runner: ModelRunner) -> None:
    about = "The share of KV blocks that sessions hold; blocks that only remember a beginning count as free."
    metrics.read_gauge("stitch_kv_cache_usage_ratio", about, lambda: pool.usage)
    metrics.read_gauge("stitch_sessions_running", "Sessions with KV here.", lambda: front.running_sessions)
    metrics.read_gauge("stitch_sessions_waiting", "Sessions without KV yet.", lambda: front.waiting_sessions)
    metrics.read_counter("stitch_busy_seconds", "Time spent computing.", lambda: runner.busy_seconds)
    metrics.read_counter("stitch_prefix_tokens_asked", "Prompt tokens looked up.", lambda: pool.asked_tokens)
    metrics.read_counter("stitch_prefix_tokens_reused", "Of these, found in the cache.", lambda: pool.reused_tokens)


def _identity(
    cluster: ClusterConfig, place: ShardConfig, part: Part, pool: BlockPool, device: torch.device
) -> shard_pb2.ShardIdentity:
    identity = shard_pb2.ShardIdentity(
        shard=place.name,
        role=place.role,
        first_layer=place.layers[0],
        end_layer=place.layers[1],
        tokenizer=part.tokenizer,
        wire_dtype=DTYPES[cluster.compute.wire_dtype][0],
        kv_capacity_tokens=pool.tokens,
        kv_block_tokens=pool.block_tokens,
        device=str(device),
        compute_dtype=cluster.compute.dtype,
        probe="" if part.probe is None else part.probe.fingerprint,
        quantization=cluster.compute.quantization,
    )
    (identity.bottom if place.role == "bottom" else identity.top).CopyFrom(part.model.to_proto())
    identity.routes.extend(part.describe(route) for route in cluster.routes if route.name in part.cuts)
    return identity
