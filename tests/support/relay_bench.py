"""A relay with fakes at both ends, and the segments that a neighbour sends it. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stitch.sampling import Sampling
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.next_stage import NextStage, ReceivedStep
from stitch_server.engine.session_table import Opening, ReceivedSegment, SessionTable
from stitch_server.engine.types import Batch, LayerRange, StepReply
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import WIDTH, FakeDownstream, FakeUpstream, ManualClock, computed, sampled

CUTS = {"weak": LayerRange(2, 8), "strong": LayerRange(4, 8)}
BLOCKS = 32


def segment(
    session: int,
    length: int = 4,
    position: int = 0,
    *,
    epoch: int = 0,
    wants_token: bool = True,
    chain: tuple[str, ...] = (),
    route: str = "weak",
    reused: int = 0,
) -> ReceivedSegment:
    """Of a prompt of 40 tokens; at its beginning it opens the session."""
    opening = Opening(route, chain, Sampling(), tuple(range(40)), 40, reused) if position == reused else None
    return ReceivedSegment(session, epoch, position, length, wants_token, opening)


def rows_of(*segments: ReceivedSegment) -> Tensor:
    """One row a token, which says its position."""
    positions = [torch.arange(one.position, one.position + one.length) for one in segments]
    return torch.cat(positions)[:, None].expand(-1, WIDTH).float()


@dataclass
class Bench:
    """A relay with fakes at both ends."""

    last: bool
    pool: BlockPool = field(default_factory=lambda: BlockPool(BLOCKS))
    clock: ManualClock = field(default_factory=ManualClock)
    downstream: FakeDownstream = field(default_factory=FakeDownstream)
    up: FakeUpstream = field(default_factory=FakeUpstream)
    batch_tokens: int = 16
    step: int = 0

    def __post_init__(self) -> None:
        forwarding = None if self.last else StepsInFlight(self.downstream)
        intake = SessionTable(self.pool, CUTS, forwarding)
        self.relay = NextStage(self.pool, intake, forwarding, self.batch_tokens, self.clock)

    def receive(self, *segments: ReceivedSegment, upstream: FakeUpstream | None = None, pipelined: bool = False) -> int:
        self.step += 1
        hidden: Callable[[], Tensor] = lambda: rows_of(*segments)  # noqa: E731
        self.relay.receive(ReceivedStep(upstream or self.up, self.step, segments, hidden, pipelined))
        return self.step

    def compose(self) -> Batch:
        batch = self.relay.next_batch()
        assert batch is not None
        return batch

    def compute(self, non_finite: tuple[int, ...] = (), **stages: float) -> Batch:
        batch = self.compose()
        output = sampled(batch, non_finite, stages) if self.last else computed(batch, non_finite, stages)
        self.relay.deliver(batch, output)
        return batch

    @property
    def idle(self) -> bool:
        return (self.relay.running_sessions, self.pool.free_blocks) == (0, BLOCKS)


def causes(reply: StepReply) -> list[tuple[int, str]]:
    """Sessions that failed, and why."""
    return [
        (one.session_id, shard_pb2.FailureCause.Name(one.cause).removeprefix("FAILURE_CAUSE_"))
        for one in reply.failures
    ]
