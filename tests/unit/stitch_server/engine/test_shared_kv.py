"""First shards that share a top whose KV is small: sessions take turns instead of being computed again and again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest

from stitch_server.engine.first_stage import FirstStage
from stitch_server.engine.in_flight import StepsInFlight
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.scheduler import Scheduler
from stitch_server.engine.types import IncomingSegment, IncomingStep, LayerRange, OutgoingStep, Session, StepReply
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import ManualClock, any_chain, computed, new_request, sampled, without_states
from tests.support.scheduler_harness import new_batching

LAYER_RANGES = {"weak": LayerRange(0, 3)}
TOP = "top-0"


@dataclass(eq=False)
class QueuedLink:
    """The link of one first shard to the top: frames arrive in order, one turn after they were sent."""

    top: NextStage
    routes: frozenset[str] = frozenset(LAYER_RANGES)
    name: str = "bottom"
    prefix_scope: str = "bottom"
    suspects: frozenset[str] = frozenset()
    doubted: frozenset[str] = frozenset()
    frames: deque[Callable[[], None]] = field(default_factory=deque)
    sender: FirstStage | None = None

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        segments = [
            IncomingSegment(
                one.session.id,
                one.session.epoch,
                one.position,
                one.length,
                one.wants_token,
                _opening(one.session, one.position) if opens else None,
            )
            for one, opens in zip(step.segments, step.opens, strict=True)
        ]
        received = IncomingStep(step.number, tuple(segments), lambda: step.hidden, step.pipelined)
        self.frames.append(partial(self.top.receive, self, received))

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        self.frames.append(partial(self.top.close, self, list(session_ids)))

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        self.frames.append(partial(self.top.want, self, tokens, tuple(chain)))

    def reply(self, reply: StepReply) -> None:
        assert self.sender is not None
        self.frames.append(partial(self.sender.on_reply, TOP, reply))

    def grant(self, tokens: int) -> None:
        assert self.sender is not None
        self.frames.append(partial(self.sender.on_kv_room, TOP, tokens))

    def carry(self) -> None:
        for _ in range(len(self.frames)):
            self.frames.popleft()()


def _opening(session: Session, position: int) -> Session:
    """The session as its next shard sees it."""
    known, epoch = list(session.token_ids), session.epoch
    opened = Session(session.route, (), session.sampling, known, session.prompt_tokens, epoch=epoch, cached=position)
    opened.reused, opened.expected_tokens = position, session.expected_tokens
    return opened


class SharedTop:
    """Some first shards with plenty of KV over one top with little."""

    def __init__(self, top_tokens: int, first_shards: int = 2) -> None:
        self.clock, self.pool = ManualClock(), BlockPool(top_tokens // 16)
        self.top = NextStage(without_states(self.pool), LAYER_RANGES, None, any_chain, 256, self.clock)
        self.links = [QueuedLink(self.top) for _ in range(first_shards)]
        for link in self.links:
            in_flight = StepsInFlight(link, clock=self.clock)  # type: ignore[arg-type]
            kept = without_states(BlockPool(1024))
            scheduler = Scheduler(
                kept,
                LAYER_RANGES,
                new_batching(max_num_batched_tokens=256),
                close_downstream=in_flight.close_session,
                has_room=in_flight.has_room,
                is_late=in_flight.is_late,
                credit=in_flight.credit,
                clock=self.clock,
            )
            link.sender = FirstStage(kept, scheduler, in_flight, self.clock)
        self.outputs: list[list[RequestOutput]] = []
        # The requests that are not answered, with the lengths of their answers.
        self.answering: dict[Request, tuple[QueuedLink, int]] = {}
        self.needed = self.computed = self.computed_on_top = self.turns = 0

    def arrive(self, link: QueuedLink, prompt: int, answer: int, max_tokens: int = 1024) -> Request:
        """A request whose answer ends after `answer` tokens, which nobody knows before."""
        outputs: list[RequestOutput] = []
        request = new_request(
            prompt, chain=(TOP,), outputs=outputs, first_token=1000 * len(self.outputs), max_tokens=max_tokens
        )
        self.outputs.append(outputs)
        self.answering[request] = link, answer
        self.needed += prompt + answer - 1
        assert link.sender is not None
        link.sender.admit(request)
        return request

    def turn(self) -> None:
        """Every shard computes one pass, if it has one, and frames arrive."""
        self.clock.advance(0.01)
        self.turns += 1
        for link in self.links:
            first = link.sender
            assert first is not None
            if (batch := first.next_batch()) is not None:
                self.computed += batch.num_tokens
                first.deliver(batch, computed(batch))
            link.carry()
        if (batch := self.top.next_batch()) is not None:
            self.computed_on_top += batch.num_tokens
            self.top.deliver(batch, sampled(batch))
        for link in self.links:
            link.carry()
        self._leave()

    def _leave(self) -> None:
        """Clients leave once they have their answer, as at a stop string."""
        for request, (link, answer) in list(self.answering.items()):
            if request.generated >= answer:
                del self.answering[request]
                assert link.sender is not None
                link.sender.abandon(request)

    def run(self, max_turns: int = 20_000) -> None:
        while self.answering:
            self.turn()
            assert self.turns < max_turns, "a request never ends"
        assert all(one.error is None for outputs in self.outputs for one in outputs)
        for _ in range(3):
            self.turn()
        assert (self.top.running_sessions, self.pool.usage) == (0, 0.0)

    @property
    def waste(self) -> float:
        """Computed tokens by needed ones."""
        return max(self.computed, self.computed_on_top) / self.needed


@pytest.mark.parametrize(
    ("first_shards", "prompt", "answer"), [(1, 20, 200), (2, 20, 200), (2, 100, 60), (2, 300, 20), (3, 100, 60)]
)
def test_full_top_computes_little_more_than_needed(first_shards: int, prompt: int, answer: int) -> None:
    shared = SharedTop(top_tokens=2 * (prompt + answer) + 160, first_shards=first_shards)
    for number in range(24):
        shared.arrive(shared.links[number % first_shards], prompt, answer)
    shared.run()
    assert shared.waste <= 1.3


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_of_mixed_lengths_are_computed_little_more_than_once(seed: int) -> None:
    draw, shared = random.Random(seed), SharedTop(top_tokens=1024, first_shards=2)
    for _ in range(60):
        shared.arrive(draw.choice(shared.links), draw.randrange(10, 300), draw.randrange(1, 150))
        for _ in range(draw.randrange(12)):
            shared.turn()
    shared.run()
    assert shared.waste <= 1.3


def test_first_shards_share_the_top_evenly() -> None:
    shared = SharedTop(top_tokens=600, first_shards=2)
    requests = [(link, shared.arrive(link, 60, 60)) for link in shared.links for _ in range(30)]
    while sum(one.status.name == "FINISHED" for _, one in requests) < 30:
        shared.turn()
    finished = [sum(one.status.name == "FINISHED" for link, one in requests if link is own) for own in shared.links]
    assert abs(finished[0] - finished[1]) <= 4
