"""The real shard servicer over a shard without a model, called without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import torch
from torch import Tensor

from stitch.cluster import ClusterConfig, GatewayConfig, ModelConfig, PairConfig, RouteConfig, ShardConfig
from stitch.membership import Membership
from stitch.process import InFlightTracker
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.pass_age import PassAge
from stitch_server.engine.types import LayerRange
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from stitch_server.neighbours import Neighbours
from stitch_server.rpc.servicer import ShardServicer
from stitch_server.rpc.tensors import Packed, unpack
from tests.support.engine_fakes import WIDTH, FakeDownstream, ManualClock, computed, sampled, without_states
from tests.support.first_stage_harness import new_first_stage

LAYER_RANGES = {"weak": LayerRange(2, 4)}
CONTEXT_LENGTH, VOCABULARY_SIZE = 64, 100
BLOCKS = 8
CLUSTER = ClusterConfig(
    name="pair",
    models=PairConfig(bottom=ModelConfig(id="large", source="large"), top=ModelConfig(id="small", source="small")),
    routes=(RouteConfig(name="weak", bottom_layers=3, top_from=2, stitch="weak.safetensors"),),
    shards=(
        ShardConfig(name="bottom-0", role="bottom", layers=(0, 4), address="127.0.0.1:1"),
        ShardConfig(name="top-0", role="top", layers=(2, 4), address="127.0.0.1:2"),
    ),
    gateway=GatewayConfig(address="127.0.0.1:3"),
)


class Aborted(Exception):
    """The status with which a call ended."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class FakeContext:
    """The context of a call without TLS and without a deadline, which a method can abort."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def time_remaining(self) -> None:
        return None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        raise Aborted(code, details)


@dataclass
class InlineEngine:
    """Runs each command at once, and then every batch that is ready unless `computes` is false."""

    stage: FirstStage | NextStage
    downstream: FakeDownstream
    computes: bool = True
    pass_age: PassAge = field(default_factory=PassAge)

    def post(self, command: Callable[[], None]) -> None:
        command()
        while self.computes and (batch := self.stage.next_batch()) is not None:
            if isinstance(self.stage, NextStage):
                self.stage.deliver(batch, sampled(batch))
            else:
                self.stage.deliver(batch, computed(batch, stages={"bottom_prefill": 0.5}))
                self.stage.on_reply("top-0", self.downstream.answer(self.downstream.last))


@dataclass
class WeightlessShard:
    """The attributes that a servicer reads of the first or the last shard of a chain, without a model."""

    first: bool
    tokenizer_files: list[Path] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)
    first_hop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.pool, self.downstream = BlockPool(BLOCKS), FakeDownstream()
        name, role = ("bottom-0", "bottom") if self.first else ("top-0", "top")
        self.neighbours = Neighbours(Membership(CLUSTER), CLUSTER.shard(name))
        self.first_stage = self.next_stage = None
        if self.first:
            clock = ManualClock()
            self.first_stage = new_first_stage(self.pool, self.downstream, clock, 4, max_waiting_sessions=2)
        else:
            self.next_stage = NextStage(
                without_states(self.pool), LAYER_RANGES, None, self.neighbours.check_chain, max_merged_tokens=64
            )
        self.engine = InlineEngine(self.stage, self.downstream)
        self.in_flight = InFlightTracker(f"shard {name}")
        self.config = CLUSTER.shard(name)
        self.loaded = SimpleNamespace(
            model=SimpleNamespace(vocabulary_size=VOCABULARY_SIZE, context_length=CONTEXT_LENGTH), head=None
        )
        self.cluster = CLUSTER
        self.identity = new_identity(name, role)
        self.metrics = SimpleNamespace(link_bytes_received=SimpleNamespace(inc=self.received_bytes.append))
        self.max_prefill_tokens = 128

    @property
    def stage(self) -> FirstStage | NextStage:
        stage = self.first_stage or self.next_stage
        assert stage is not None
        return stage

    @property
    def suspects(self) -> list[str]:
        return []

    @property
    def running_sessions(self) -> int:
        return self.stage.running_sessions

    @property
    def waiting_sessions(self) -> int:
        return self.stage.waiting_sessions

    @property
    def kv_free_tokens(self) -> int:
        return self.pool.free_blocks * BLOCK_TOKENS

    def incoming_width(self, role: str) -> int:
        return WIDTH

    def unpack(self, packed: Packed) -> Tensor:
        return unpack(packed, torch.device("cpu"), torch.float32)

    def check_stitch(self, route: str, bottom: inference_pb2.Model) -> None:
        """Accepts every stitch."""

    def start_draining(self) -> None:
        self.in_flight.close()
        if self.next_stage is not None:
            self.engine.post(self.next_stage.drain)

    @property
    def idle(self) -> bool:
        return (self.running_sessions, self.waiting_sessions) == (0, 0) and self.pool.free_blocks == BLOCKS

    @property
    def servicer(self) -> ShardServicer:
        shard: Any = self
        return ShardServicer(shard)


def new_identity(shard: str, role: str) -> shard_pb2.ShardIdentity:
    """The identity of a shard with layers 0 to 3 of the bottom model, or 2 to 3 of the top model."""
    identity = shard_pb2.ShardIdentity(shard=shard, role=role, first_layer=0 if role == "bottom" else 2, end_layer=4)
    identity.routes.add(name="weak", bottom_layers=3, top_from=2, stitch="fingerprint")
    identity.wire_dtype = shard_pb2.DTYPE_FLOAT32
    return identity


def call_context() -> Any:
    """A fake context, typed as the one that a servicer takes."""
    return FakeContext()


async def stream(
    frames: Sequence[shard_pb2.LinkRequest], end: asyncio.Event | None = None
) -> AsyncIterator[shard_pb2.LinkRequest]:
    """The frames of an upstream shard, and then the end of its stream: at once, or when `end` is set."""
    for frame in frames:
        yield frame
    if end is not None:
        await end.wait()
