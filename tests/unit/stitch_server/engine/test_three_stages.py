"""Three stages under random load and late frames: every request ends once, no token repeats, no block leaks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from stitch.errors import Exhausted, OutOfStep, Unavailable
from stitch.v1 import shard_pb2
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import BatchSource, StepsInFlight
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.scheduler import Scheduler
from stitch_server.engine.types import Batch, LayerRange, OutgoingStep, StepOutput, StepReply
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from stitch_server.rpc.frames import StepAssembler, StepLimits, step_frames
from stitch_server.rpc.tensors import pack, unpack
from tests.support.engine_fakes import WIDTH, ManualClock, any_chain, computed, new_request, sampled, without_states
from tests.support.scheduler_harness import new_batching

pytestmark = pytest.mark.slow

CHAIN = ("middle", "last")
LAYER_RANGES = {"weak": LayerRange(0, 2), "strong": LayerRange(0, 3)}


# Beyond what a first shard sends.
LIMITS = StepLimits(10_000, 1 << 30)


@dataclass(eq=False)
class LateLink:
    """A link that delays frames: urgent ones overtake the others, replies keep their order."""

    forward: deque[tuple[bool, Callable[[], None]]] = field(default_factory=deque)
    backward: deque[Callable[[], None]] = field(default_factory=deque)
    receiver: NextStage | None = None
    routes: frozenset[str] = frozenset(LAYER_RANGES)
    prefix_scope: str = ""
    suspects: frozenset[str] = frozenset()
    doubted: frozenset[str] = frozenset()
    assembler: StepAssembler = field(
        default_factory=lambda: StepAssembler(
            WIDTH, shard_pb2.DTYPE_FLOAT32, LIMITS, lambda packed: unpack(packed, torch.device("cpu"), torch.float32)
        )
    )
    # The sender's, and the name of the receiver.
    on_reply: Callable[[str, StepReply], None] | None = None
    name: str = ""
    on_room: Callable[[int], None] | None = None

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        assert self.receiver is not None
        # As over a real link: packed and parsed again.
        packed = pack(step.hidden, shard_pb2.DTYPE_FLOAT32)
        steps = [self.assembler.add(frame.step) for frame in step_frames(step, packed)]
        assert steps[-1] is not None
        self.forward.append((step.urgent, partial(self.receiver.receive, self, steps[-1])))

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        assert self.receiver is not None
        self.forward.append((False, partial(self.receiver.close, self, list(session_ids))))

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        assert self.receiver is not None
        self.forward.append((False, partial(self.receiver.want, self, tokens, tuple(chain))))

    def reply(self, reply: StepReply) -> None:
        assert self.on_reply is not None
        self.assembler.answered(reply.step)
        self.backward.append(partial(self.on_reply, self.name, reply))

    def grant(self, tokens: int) -> None:
        assert self.on_room is not None
        self.backward.append(partial(self.on_room, tokens))

    def carry(self, draw: random.Random) -> None:
        """Delivers one frame, in either direction."""
        if self.backward and draw.random() < 0.5:
            self.backward.popleft()()
        elif self.forward:
            urgent = next((index for index, (first, _) in enumerate(self.forward) if first), 0)
            _, arrive = self.forward[urgent]
            del self.forward[urgent]
            arrive()


class Simulation:
    """A first, a middle and a last stage, each with few KV blocks."""

    def __init__(self, seed: int) -> None:
        self.draw, self.clock = random.Random(seed), ManualClock()
        self.pools = [BlockPool(self.draw.randrange(6, 14)) for _ in range(3)]
        self.links = LateLink(), LateLink()
        batching = new_batching(
            max_prefill_chunk=self.draw.choice([17, 33]),
            max_num_batched_tokens=66,
            prefill_budget_while_decoding=8,
            num_micro_batches=self.draw.randrange(1, 4),
        )
        first, middle, last = map(without_states, self.pools)
        in_flight = StepsInFlight(self.links[0])
        scheduler = Scheduler(
            first,
            LAYER_RANGES,
            batching,
            close_downstream=in_flight.close_session,
            credit=in_flight.credit,
            clock=self.clock,
        )
        self.first = FirstStage(first, scheduler, in_flight, self.clock)
        self.middle = NextStage(middle, LAYER_RANGES, StepsInFlight(self.links[1]), any_chain, 24, self.clock)
        self.last = NextStage(last, LAYER_RANGES, None, any_chain, 24, self.clock)
        self.links[0].name, self.links[1].name = CHAIN
        self.links[0].receiver, self.links[0].on_reply = self.middle, self.first.on_reply
        self.links[1].receiver, self.links[1].on_reply = self.last, self.middle.on_reply
        self.links[0].on_room = partial(self.first.on_kv_room, CHAIN[0])
        self.links[1].on_room = partial(self.middle.on_kv_room, CHAIN[1])
        self.live: dict[int, tuple[Request, list[RequestOutput]]] = {}
        self.outcomes: list[str] = []

    def arrive(self) -> None:
        outputs: list[RequestOutput] = []
        tokens = self.draw.randrange(1, 5 * BLOCK_TOKENS)
        session = new_request(
            tokens,
            self.draw.choice(list(LAYER_RANGES)),
            chain=CHAIN,
            outputs=outputs,
            first_token=self.draw.choice([0, 1000]),
            max_tokens=self.draw.randrange(1, 25),
        )
        self.live[session.id] = (session, outputs)
        self.first.admit(session)

    def compute(self) -> None:
        """One stage computes its next batch, if it has one."""
        stages: list[BatchSource] = [self.first, self.middle, self.last]
        stage = self.draw.choice(stages)
        batch = stage.next_batch()
        if batch is None:
            return
        if stage is not self.first and self.draw.random() < 0.01:
            stage.fail(batch, RuntimeError("out of paper"))
        else:
            stage.deliver(batch, self.output(stage, batch))

    def output(self, stage: BatchSource, batch: Batch) -> StepOutput:
        non_finite = [index for index in range(len(batch.segments)) if self.draw.random() < 0.004]
        if stage is self.last:
            return sampled(batch, non_finite)
        return computed(batch, non_finite if stage is self.middle else [])

    def turn(self, load: bool) -> None:
        self.clock.advance(0.005)
        if load and self.draw.random() < 0.08:
            self.arrive()
        if load and self.live and self.draw.random() < 0.02:
            self.first.abandon(self.live.pop(self.draw.choice(sorted(self.live)))[0])
        self.compute()
        for link in self.links:
            link.carry(self.draw)
        for number, (session, outputs) in list(self.live.items()):
            if outputs and (outputs[-1].finish_reason is not None or outputs[-1].error is not None):
                self.check(session, outputs)
                del self.live[number]

    def check(self, session: Request, outputs: list[RequestOutput]) -> None:
        """A client receives every token once, in order, and at last one finish reason or error."""
        positions = [one.token.position for one in outputs if one.token is not None]
        assert positions == list(range(session.prompt_tokens, session.prompt_tokens + len(positions)))
        assert all(one.finish_reason is None and one.error is None for one in outputs[:-1])
        error = outputs[-1].error
        assert error is None or isinstance(error, OutOfStep | Unavailable | Exhausted)
        if isinstance(error, OutOfStep):
            assert "are not finite" in str(error)
        self.outcomes.append("finished" if error is None else type(error).__name__)

    @property
    def quiet(self) -> bool:
        return not self.live and not any(link.forward or link.backward for link in self.links)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_and_frees_its_blocks(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(1500):
        simulation.turn(load=True)
    turns = 0
    while not simulation.quiet:
        simulation.turn(load=False)
        turns += 1
        assert turns < 50_000, "a request never ends"
    assert simulation.outcomes.count("finished") > 5
    stages = simulation.first, simulation.middle, simulation.last
    assert [(stage.running_sessions, stage.waiting_sessions) for stage in stages] == [(0, 0)] * 3
    assert [pool.usage for pool in simulation.pools] == [0.0] * 3
