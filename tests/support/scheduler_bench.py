"""A scheduler whose chain answers when a test says so."""

from __future__ import annotations

from stitch_server.engine.scheduler import Limits, Scheduler
from stitch_server.engine.session import Request
from stitch_server.engine.types import LayerRange, Segment
from stitch_server.kv_cache.block_pool import BlockPool
from tests.support.engine_fakes import TOKEN_ID, ManualClock, new_session

CUTS = {"weak": LayerRange(0, 3), "strong": LayerRange(0, 4)}


class SchedulerBench:
    """A scheduler, and a chain that answers whenever a test says so."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.pool, self.clock = BlockPool(blocks), ManualClock()
        self.dropped: list[Request] = []
        self.scheduler = Scheduler(
            self.pool, CUTS, Limits(**{"prompts_together": 1} | limits), self.dropped.append, self.clock
        )

    def add(self, *sessions: Request) -> None:
        for session in sessions:
            self.scheduler.add(session)

    def take(self) -> list[tuple[Request, int, int]]:
        """The next pass as (session, position, length)."""
        return [(one_of(segment), segment.position, segment.length) for segment in self.scheduler.next_segments()]

    def answer(self, *sessions: Request) -> None:
        """The chain sampled a token for each of these."""
        for session in sessions:
            session.answered = True
            session.token_ids.append(TOKEN_ID)

    def decoding(self, *tokens: int) -> list[Request]:
        """Sessions with prompts of so many tokens, which are computed and answered."""
        sessions = [new_session(count, first_token=100 * index) for index, count in enumerate(tokens)]
        self.add(*sessions)
        while any(session.remaining for session in sessions):
            self.scheduler.next_segments()
        self.answer(*sessions)
        return sessions


def one_of(segment: Segment) -> Request:
    """The session that a segment belongs to."""
    assert isinstance(segment.session, Request)
    return segment.session
