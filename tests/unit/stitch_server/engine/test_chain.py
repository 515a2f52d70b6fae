"""Three shards under random load, with frames that are late: everybody ends, nothing is said twice, nothing stays."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from stitch.errors import Exhausted, OutOfStep, Unavailable
from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import BatchSource, StepsInFlight
from stitch_server.engine.next_stage import NextStage, ReceivedStep
from stitch_server.engine.scheduler import Limits
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.session_table import Opening, ReceivedSegment, SessionTable
from stitch_server.engine.types import Batch, LayerRange, OutgoingStep, StepOutput, StepReply
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS, BlockPool
from tests.support.engine_fakes import WIDTH, ManualClock, computed, new_session, sampled

CHAIN = ("middle:1", "last:1")
CUTS = {"weak": LayerRange(0, 2), "strong": LayerRange(0, 3)}


@dataclass(eq=False)
class LateLink:
    """One link: frames arrive in their order, but urgent ones pass the others; replies arrive in theirs."""

    forward: deque[tuple[bool, Callable[[], None]]] = field(default_factory=deque)
    backward: deque[Callable[[], None]] = field(default_factory=deque)
    receiver: NextStage | None = None
    replied: Callable[[StepReply], None] | None = None

    def send(self, address: str, step: OutgoingStep) -> None:
        assert self.receiver is not None
        segments = tuple(
            ReceivedSegment(
                one.session.id,
                one.session.epoch,
                one.position,
                one.length,
                one.wants_token,
                self._opening(one.session) if opens else None,  # type: ignore[arg-type]
            )
            for one, opens in zip(step.segments, step.opens, strict=True)
        )
        rows = torch.zeros(len(step.hidden), WIDTH)
        received = ReceivedStep(self, step.number, segments, lambda: rows, step.pipelined)
        self.forward.append((step.urgent, partial(self.receiver.receive, received)))

    def close(self, address: str, numbers: Sequence[int]) -> None:
        assert self.receiver is not None
        self.forward.append((False, partial(self.receiver.close, self, list(numbers))))

    def reply(self, reply: StepReply) -> None:
        assert self.replied is not None
        self.backward.append(partial(self.replied, reply))

    @staticmethod
    def _opening(session: Request) -> Opening:
        known = tuple(session.token_ids)
        return Opening(session.route, session.chain[1:], session.sampling, known, session.prompt_tokens, session.reused)

    def carry(self, draw: random.Random) -> None:
        """One frame arrives, in either direction."""
        if self.backward and draw.random() < 0.5:
            self.backward.popleft()()
        elif self.forward:
            urgent = next((index for index, (first, _) in enumerate(self.forward) if first), 0)
            _, arrive = self.forward[urgent]
            del self.forward[urgent]
            arrive()


class Simulation:
    """An origin, a middle shard and a last one, each with little room."""

    def __init__(self, seed: int) -> None:
        self.draw, self.clock = random.Random(seed), ManualClock()
        self.pools = [BlockPool(self.draw.randrange(6, 14)) for _ in range(3)]
        self.links = LateLink(), LateLink()
        limits = Limits(
            prefill_tokens=self.draw.choice([17, 33]), prefill_tokens_beside_decode=8, groups=self.draw.randrange(1, 4)
        )
        self.origin = FirstStage(self.pools[0], CUTS, limits, StepsInFlight(self.links[0]), self.clock)
        behind = StepsInFlight(self.links[1])
        self.middle = NextStage(self.pools[1], SessionTable(self.pools[1], CUTS, behind), behind, 24, self.clock)
        self.last = NextStage(self.pools[2], SessionTable(self.pools[2], CUTS, None), None, 24, self.clock)
        self.links[0].receiver, self.links[0].replied = self.middle, self.origin.replied
        self.links[1].receiver, self.links[1].replied = self.last, self.middle.replied
        self.live: dict[int, tuple[Request, list[RequestOutput]]] = {}
        self.outcomes: list[str] = []

    def arrive(self) -> None:
        heard: list[RequestOutput] = []
        tokens = self.draw.randrange(1, 5 * BLOCK_TOKENS)
        session = new_session(
            tokens,
            self.draw.choice(list(CUTS)),
            chain=CHAIN,
            heard=heard,
            first_token=self.draw.choice([0, 1000]),
            max_tokens=self.draw.randrange(1, 25),
        )
        self.live[session.id] = (session, heard)
        self.origin.admit(session)

    def compute(self) -> None:
        """One shard takes a pass, if it can; the others are busy."""
        fronts: list[BatchSource] = [self.origin, self.middle, self.last]
        front = self.draw.choice(fronts)
        batch = front.next_batch()
        if batch is None:
            return
        if front is not self.origin and self.draw.random() < 0.01:
            front.fail(batch, RuntimeError("out of paper"))
        else:
            front.deliver(batch, self.output(front, batch))

    def output(self, front: BatchSource, batch: Batch) -> StepOutput:
        non_finite = [index for index in range(len(batch.segments)) if self.draw.random() < 0.004]
        if front is self.last:
            return sampled(batch, non_finite)
        return computed(batch, non_finite if front is self.middle else [])

    def turn(self, load: bool) -> None:
        self.clock.advance(0.005)
        if load and self.draw.random() < 0.08:
            self.arrive()
        if load and self.live and self.draw.random() < 0.02:
            self.origin.abandon(self.live.pop(self.draw.choice(sorted(self.live)))[0])
        self.compute()
        for link in self.links:
            link.carry(self.draw)
        for number, (session, heard) in list(self.live.items()):
            if heard and (heard[-1].finish_reason is not None or heard[-1].error is not None):
                self.check(session, heard)
                del self.live[number]

    def check(self, session: Request, heard: list[RequestOutput]) -> None:
        """A session is told every token once and in order, and at last how it ended."""
        positions = [one.token.position for one in heard if one.token is not None]
        assert positions == list(range(session.prompt_tokens, session.prompt_tokens + len(positions)))
        assert all(one.finish_reason is None and one.error is None for one in heard[:-1])
        error = heard[-1].error
        assert error is None or isinstance(error, OutOfStep | Unavailable | Exhausted)
        if isinstance(error, OutOfStep):
            assert "are not finite" in str(error)
        self.outcomes.append("finished" if error is None else type(error).__name__)

    @property
    def quiet(self) -> bool:
        return not self.live and not any(link.forward or link.backward for link in self.links)


@pytest.mark.parametrize("seed", range(20))
def test_everybody_ends_and_nothing_stays(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(1500):
        simulation.turn(load=True)
    turns = 0
    while not simulation.quiet:
        simulation.turn(load=False)
        turns += 1
        assert turns < 50_000, "somebody waits for ever"
    assert simulation.outcomes.count("finished") > 5
    fronts = simulation.origin, simulation.middle, simulation.last
    assert [(front.running_sessions, front.waiting_sessions) for front in fronts] == [(0, 0)] * 3
    assert [pool.usage for pool in simulation.pools] == [0.0] * 3
