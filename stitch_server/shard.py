"""One shard: its engine around the loaded stage, and what `rpc` serves of it.

In: the cluster file's sections and a loaded stage. Out: a `Shard` whose engine is not started yet. The parts are wired
in one direction: the links put their events into the engine's inbox, the engine's batch source sends over the links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stitch import tokenizer_files
from stitch.cluster import BatchingConfig, ClusterConfig, ShardConfig
from stitch.grammar import GrammarCompiler
from stitch.process import InFlightTracker
from stitch.tls import is_loopback
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.build import KVCache, LoadedStage, allocate_kv_cache, build_runner
from stitch_server.devices import to_device_async
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import BatchSource, Downstream, StepsInFlight
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.local_hop import BothStages, LocalLink
from stitch_server.engine.loop import Engine, Inbox
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.scheduler import Scheduler
from stitch_server.engine.session_table import OpeningLimits
from stitch_server.engine.types import Batch, LinkEvent
from stitch_server.kv_cache.block_pool import BlockPool
from stitch_server.kv_cache.hidden_states import HiddenStateCache
from stitch_server.metrics import Metrics, PassObserver
from stitch_server.model.constraint import Constraints
from stitch_server.model.embedding_and_head import Embedding
from stitch_server.model.probe import MAX_PROBE_TOKENS
from stitch_server.neighbours import Neighbours
from stitch_server.rpc.tensors import DTYPES, Packed, unpack
from stitch_server.worker.model_runner import ModelRunner

# Opens this shard's links, for its identity and the receiver of their events.
OpenLinks = Callable[[shard_pb2.ShardIdentity, Callable[[LinkEvent], None]], Downstream]


@dataclass(slots=True, kw_only=True)
class Shard:
    """A loaded shard with its engine. It has a first stage, a next stage, or both."""

    cluster: ClusterConfig
    config: ShardConfig
    loaded: LoadedStage
    identity: shard_pb2.ShardIdentity
    neighbours: Neighbours
    metrics: Metrics
    engine: Engine
    # To the next shards, and the steps that they have not answered; None where every route ends here.
    links: Downstream
    steps_in_flight: StepsInFlight | None
    first_stage: FirstStage | None
    next_stage: NextStage | None
    # `Generate` calls and the sessions of links; closed while the shard drains.
    in_flight: InFlightTracker
    pool: BlockPool
    device: torch.device
    # Prompt tokens that an upstream shard may send in one step.
    max_prefill_tokens: int

    @property
    def first_hop(self) -> tuple[str, ...]:
        """This shard where its own next stage computes what its first stage sends; the chain of a request follows."""
        return (self.config.name,) if self.first_stage is not None and self.next_stage is not None else ()

    @property
    def kv_free_tokens(self) -> int:
        """The KV tokens that new sessions may use."""
        return self.pool.room_tokens

    @property
    def suspects(self) -> list[str]:
        """The next shards that get no new sessions from this one, by name."""
        return sorted(self.links.suspects | self.links.doubted)

    @property
    def running_sessions(self) -> int:
        """Sessions with KV blocks."""
        # Where there are both stages, the next stage holds the KV of all sessions.
        stage = self.next_stage or self.first_stage
        return 0 if stage is None else stage.running_sessions

    @property
    def waiting_sessions(self) -> int:
        """Sessions that wait for KV blocks."""
        return 0 if self.first_stage is None else self.first_stage.waiting_sessions

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files from which a gateway makes its tokenizer."""
        return tokenizer_files.paths(self.loaded.folder)

    def incoming_width(self, caller_role: str) -> int:
        """The hidden size that an upstream shard of this role sends."""
        widths = [stitch.binding.bottom_hidden for stitch in self.loaded.stitches.values() if stitch is not None]
        return widths[0] if caller_role != self.config.role and widths else self.loaded.model.hidden_size

    def unpack(self, packed: Packed) -> Tensor:
        """Received hidden states in this shard's dtype, on its device; runs in the engine's thread."""
        return unpack(packed, self.device, getattr(torch, self.cluster.compute.dtype))

    def check_stitch(self, route: str, bottom: inference_pb2.Model) -> None:
        """Raises Incompatible where the route's stitch was not made for this bottom model."""
        stitch = self.loaded.stitches.get(route)
        if stitch is not None:
            stitch.check_models(bottom=bottom)

    def start_draining(self) -> None:
        """Refuses new sessions from now on; the running ones continue."""
        # Closed before the command is posted: a session that the tracker admits no more is refused by the engine, too.
        self.in_flight.close()
        if self.next_stage is not None:
            self.engine.post(self.next_stage.drain)


def build_shard(
    cluster: ClusterConfig,
    config: ShardConfig,
    loaded: LoadedStage,
    device: torch.device,
    open_links: OpenLinks,
    metrics: Metrics,
    neighbours: Neighbours,
    step_log: PassObserver | None = None,
) -> Shard:
    """Builds KV cache, runner, links, stages and engine around the loaded stage; nothing runs yet."""
    kv_cache = allocate_kv_cache(cluster.compute, loaded.decoder, loaded.model.context_length, device, loaded.cuts)
    runner = build_runner(cluster, config, loaded, kv_cache, device)
    identity, inbox = _identity(cluster, config, loaded, kv_cache.pool, device), Inbox()
    links = open_links(identity, inbox.put)
    steps = StepsInFlight(links, count_strays=metrics.link_stray_replies.inc)
    batching = resolved_batching(cluster, device)
    builder = _StageBuilder(cluster, config, loaded, device, batching, neighbours)
    stages = builder.build(_kept_prefixes(loaded, kv_cache), steps, inbox.put)
    shard = Shard(
        cluster=cluster,
        config=config,
        loaded=loaded,
        identity=identity,
        neighbours=neighbours,
        metrics=metrics,
        engine=Engine(stages.source, runner, inbox, _pass_observer(metrics, step_log)),
        links=links,
        steps_in_flight=steps if loaded.goes_on else None,
        first_stage=stages.first,
        next_stage=stages.next,
        in_flight=InFlightTracker(f"shard {config.name}"),
        pool=kv_cache.pool,
        device=device,
        max_prefill_tokens=_max_prefill_tokens(cluster, batching),
    )
    _register_metrics(metrics, shard, runner, kv_cache.states)
    return shard


@dataclass(frozen=True, slots=True)
class _Stages:
    """The stages of one shard: at least one, and the batch source that the engine computes for."""

    source: BatchSource
    first: FirstStage | None = None
    next: NextStage | None = None


@dataclass(frozen=True, slots=True)
class _StageBuilder:
    """Chooses and builds the stages of one shard."""

    cluster: ClusterConfig
    config: ShardConfig
    loaded: LoadedStage
    device: torch.device
    batching: BatchingConfig
    neighbours: Neighbours

    def build(self, kept: KeptPrefixes, steps: StepsInFlight, on_event: Callable[[LinkEvent], None]) -> _Stages:
        """The stages that the routes of this shard need.

        The bottom's first shard, on which all of its routes begin, has a first stage alone. All other shards have a
        next stage for the routes that come over links. Where routes of the top model alone begin, the top's first shard
        has a first stage as well, which sends to the next stage over a `LocalLink`.

        `steps` are those sent to the next shards; `on_event` takes the events of the `LocalLink`.
        """
        embedding = self.loaded.embedding
        if embedding is not None and self.config.role == "bottom":
            first = self._first(kept, steps, "bottom_prefill")
            return _Stages(first, first=first)
        next_stage = self._next(kept, steps)
        if embedding is None:
            return _Stages(next_stage, next=next_stage)
        first = self._first_on_local_link(next_stage, kept.pool, on_event)
        both = BothStages(self.config.name, first, next_stage, _embed_on(self.device, embedding))
        return _Stages(both, first=first, next=next_stage)

    def _first(self, kept: KeptPrefixes, steps: StepsInFlight, stage: str) -> FirstStage:
        loaded = self.loaded
        scheduler = Scheduler(
            kept,
            loaded.layer_ranges,
            self.batching,
            close_downstream=steps.close_session,
            credit=steps.credit,
            attention_cost_per_token=loaded.decoder.attention_cost_per_token,
            min_efficient_tokens=loaded.decoder.min_efficient_tokens,
            probe_tokens=0 if loaded.probe is None else loaded.probe.binding.tokens,
            has_room=steps.has_room,
            is_late=steps.is_late,
            route_costs={name: loaded.describe(self.cluster.route(name)).parameters for name in loaded.layer_ranges},
        )
        constrain = _constraints(loaded)
        return FirstStage(kept, scheduler, steps, shard=self.config.name, stage=stage, constrain=constrain)

    def _next(self, kept: KeptPrefixes, steps: StepsInFlight) -> NextStage:
        return NextStage(
            kept,
            self.loaded.layer_ranges,
            steps if self.loaded.goes_on else None,
            self.neighbours.check_chain,
            self.batching.max_merged_tokens,
            limits=_opening_limits(self.loaded),
            shard=self.config.name,
            constrain=_constraints(self.loaded),
        )

    def _first_on_local_link(
        self, next_stage: NextStage, pool: BlockPool, on_event: Callable[[LinkEvent], None]
    ) -> FirstStage:
        """A first stage that sends to the next stage of this shard, which holds all KV in `pool`."""
        beginning = self.cluster.beginning_on(self.config.stage)
        link = LocalLink(self.config.name, beginning, next_stage, on_event)
        # Its blocks are counted, and their tokens are in the next stage's.
        counted = BlockPool(pool.blocks, pool.block_tokens)
        return self._first(KeptPrefixes(counted, {}, None), StepsInFlight(link), "top_prefill")


def _kept_prefixes(loaded: LoadedStage, kv_cache: KVCache) -> KeptPrefixes:
    # States of tokens that skip FFNs are those of one route, and of generated tokens alone.
    exact = {name: layers for name, layers in loaded.layer_ranges.items() if name not in loaded.ffn_skips}
    return KeptPrefixes(kv_cache.pool, exact, kv_cache.states)


def _pass_observer(metrics: Metrics, step_log: PassObserver | None) -> PassObserver:
    def observe(batch: Batch, started: float, ended: float) -> None:
        metrics.batch_tokens.observe(batch.num_tokens)
        if step_log is not None:
            step_log(batch, started, ended)

    return observe


def _max_prefill_tokens(cluster: ClusterConfig, batching: BatchingConfig) -> int:
    probe_tokens = 0 if cluster.gateway.probe is None else MAX_PROBE_TOKENS
    return max(batching.max_merged_tokens, batching.max_num_batched_tokens + probe_tokens)


def _embed_on(device: torch.device, embedding: Embedding) -> Callable[[list[int]], Tensor]:
    return lambda token_ids: embedding(to_device_async(torch.tensor(token_ids), device))


def _constraints(loaded: LoadedStage) -> Constraints | None:
    if loaded.head is None:
        return None
    tokenizer, logits = loaded.folder / "tokenizer.json", loaded.head.vocabulary_size
    return Constraints(GrammarCompiler(tokenizer.read_text, logits), logits)


def _opening_limits(loaded: LoadedStage) -> OpeningLimits:
    # The bottom's vocabulary, which a prompt's tokens are from, may be padded further than the top's.
    limits = OpeningLimits(loaded.model.context_length, 2 * loaded.model.vocabulary_size)
    return limits if loaded.head is None else replace(limits, logits=loaded.head.vocabulary_size)


def resolved_batching(cluster: ClusterConfig, device: torch.device) -> BatchingConfig:
    """The cluster's batching with the number of micro-batches that suits its shards, where the file leaves it open."""
    num_micro_batches = cluster.batching.num_micro_batches or (1 if _share_cores(cluster, device) else 2)
    return cluster.batching.model_copy(update={"num_micro_batches": num_micro_batches})


def _share_cores(cluster: ClusterConfig, device: torch.device) -> bool:
    """Whether all shards compute on all cores of one machine, so that each slows the others down."""
    compute, hosts = cluster.compute, [shard.address.rpartition(":")[0] for shard in cluster.shards]
    return (
        device.type == "cpu"
        and compute.threads == compute.threads_while_pipelined == 0
        and all(map(is_loopback, hosts))
    )


def _register_metrics(metrics: Metrics, shard: Shard, runner: ModelRunner, states: HiddenStateCache | None) -> None:
    about = "The share of KV blocks that sessions hold; blocks that only cache a prefix count as free."
    metrics.read_gauge("stitch_kv_cache_usage_ratio", about, lambda: shard.pool.usage)
    about = "The tokens that the KV cache holds."
    metrics.read_gauge("stitch_kv_cache_capacity_tokens", about, lambda: shard.pool.tokens)
    metrics.read_gauge("stitch_sessions_running", "Sessions with KV blocks.", lambda: shard.running_sessions)
    metrics.read_gauge("stitch_sessions_waiting", "Sessions that wait for KV blocks.", lambda: shard.waiting_sessions)
    metrics.read_counter("stitch_busy_seconds", "Seconds spent in forward passes.", lambda: runner.busy_seconds)
    about = "Next shards that have been silent for too long, and get no new sessions from this one."
    metrics.read_gauge("stitch_suspects", about, lambda: len(shard.links.suspects))
    about = "How long a next shard has answered none of its steps; of several the longest."
    steps = shard.steps_in_flight
    metrics.read_gauge("stitch_step_age_seconds", about, lambda: 0.0 if steps is None else steps.age_seconds)
    about = "Prompt tokens that were looked up in the prefix cache."
    metrics.read_counter("stitch_prefix_tokens_asked", about, lambda: shard.pool.queried_tokens)
    about = "Prompt tokens that were found in the prefix cache."
    metrics.read_counter("stitch_prefix_tokens_reused", about, lambda: shard.pool.reused_tokens)
    about = "Tokens whose lower layers were not computed again, since their hidden states were kept."
    metrics.read_counter("stitch_prefix_tokens_resumed", about, lambda: states.resumed_tokens if states else 0)
    about = "The share of the room for hidden states that is in use."
    metrics.read_gauge("stitch_state_cache_usage_ratio", about, lambda: states.usage if states else 0.0)


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
