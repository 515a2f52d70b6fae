"""A next stage between a fake upstream link and fake next shards, and the segments that it receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.types import Batch, IncomingSegment, IncomingStep, LayerRange, Session, StepReply
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import (
    WIDTH,
    FakeDownstream,
    FakeUpstream,
    ManualClock,
    any_chain,
    computed,
    sampled,
    without_states,
)

LAYER_RANGES = {"weak": LayerRange(2, 8), "strong": LayerRange(4, 8)}
BLOCKS = 32


def segment(
    session_id: int,
    length: int = 4,
    position: int = 0,
    *,
    epoch: int = 0,
    wants_token: bool = True,
    chain: tuple[str, ...] = (),
    route: str = "weak",
    reused: int = 0,
) -> IncomingSegment:
    """A segment of a prompt of 40 tokens; opens the session where it is the first one after the reused prefix."""
    opened = None
    if position == reused:
        opened = Session(route, chain, Sampling(), list(range(40)), 40, epoch=epoch, cached=reused, reused=reused)
    return IncomingSegment(session_id, epoch, position, length, wants_token, opened)


def rows_of(*segments: IncomingSegment) -> Tensor:
    """One row per token, filled with its position."""
    positions = [torch.arange(one.position, one.position + one.length) for one in segments]
    return torch.cat(positions)[:, None].expand(-1, WIDTH).float()


@dataclass
class NextStageHarness:
    """A next stage with fakes at both ends."""

    last: bool
    pool: BlockPool = field(default_factory=lambda: BlockPool(BLOCKS))
    clock: ManualClock = field(default_factory=ManualClock)
    downstream: FakeDownstream = field(default_factory=FakeDownstream)
    up: FakeUpstream = field(default_factory=FakeUpstream)
    max_merged_tokens: int = 16
    step: int = 0

    def __post_init__(self) -> None:
        in_flight = None if self.last else StepsInFlight(self.downstream, clock=self.clock)
        kept = without_states(self.pool)
        self.stage = NextStage(kept, LAYER_RANGES, in_flight, any_chain, self.max_merged_tokens, self.clock)

    def receive(self, *segments: IncomingSegment, upstream: FakeUpstream | None = None, pipelined: bool = False) -> int:
        """Receives a step of these segments; returns its number."""
        self.step += 1
        hidden: Callable[[], Tensor] = lambda: rows_of(*segments)  # noqa: E731
        self.stage.receive(upstream or self.up, IncomingStep(self.step, segments, hidden, pipelined))
        return self.step

    def next_batch(self) -> Batch:
        batch = self.stage.next_batch()
        assert batch is not None
        return batch

    def compute(self, non_finite: tuple[int, ...] = (), **stages: float) -> Batch:
        """Computes the next batch."""
        batch = self.next_batch()
        output = sampled(batch, non_finite, stages) if self.last else computed(batch, non_finite, stages)
        self.stage.deliver(batch, output)
        return batch

    def answer(self, reply: StepReply) -> None:
        """Receives the reply to a step from the shard that the step was sent to."""
        self.stage.on_reply(self.downstream.receiver_of(reply.step), reply)

    @property
    def idle(self) -> bool:
        return (self.stage.running_sessions, self.pool.free_blocks) == (0, BLOCKS)


def causes(reply: StepReply) -> list[tuple[int, str]]:
    """The sessions that failed, each with the name of its cause."""
    return [
        (one.session_id, shard_pb2.FailureCause.Name(one.cause).removeprefix("FAILURE_CAUSE_"))
        for one in reply.failures
    ]
