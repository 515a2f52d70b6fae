"""Sessions whose route is read of their first tokens; and whatever comes, everybody ends."""

from __future__ import annotations

import random

import pytest

from stitch_server.engine.scheduler import BACKOFF_SECONDS
from stitch_server.engine.session import Request
from stitch_server.engine.types import RouteDecision, Segment, Token
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID, new_session
from tests.support.scheduler_bench import CUTS, SchedulerBench, one_of


class Simulation:
    """A scheduler under random load, whose chain answers late, and sometimes has no room itself."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.bench = SchedulerBench(
            blocks=self.draw.randrange(4, 12),
            prefill_tokens=self.draw.choice([8, 16, 40]),
            prompts_together=self.draw.choice([1, 3]),
            prefill_tokens_beside_decode=self.draw.choice([1, 8]),
            groups=self.draw.randrange(1, 4),
        )
        self.sessions: list[Request] = []
        self.pending: list[tuple[Request, int]] = []
        self.finished = 0

    def arrive(self) -> None:
        room = self.bench.pool.blocks * BLOCK_TOKENS
        tokens = self.draw.randrange(1, room)
        session = new_session(
            tokens,
            route=self.draw.choice(list(CUTS)),
            prompt_tokens=self.draw.randrange(1, tokens + 1),
            max_tokens=self.draw.randrange(1, 60),
        )
        self.bench.add(session)
        self.sessions.append(session)

    def compute(self) -> None:
        segments = self.bench.scheduler.next_segments()
        self.check(segments)
        for segment in segments:
            session = one_of(segment)
            self.bench.pool.publish(session.id, segment.position + segment.length)
            if segment.wants_token:
                self.pending.append((session, session.epoch))

    def check(self, segments: list[Segment]) -> None:
        """What must hold of every pass."""
        scheduler, pool = self.bench.scheduler, self.bench.pool
        assert len({one.session.id for one in segments}) == len(segments)
        for segment in segments:
            assert segment.session.id in scheduler.running
            assert segment.length >= 1
            assert segment.position + segment.length == segment.session.cached
            assert len(segment.blocks) * BLOCK_TOKENS >= segment.session.cached
        held = {block for number in scheduler.running for block in pool.blocks_of(number)}
        assert pool.free_blocks == pool.blocks - len(held)
        limits = scheduler._limits
        prefill = sum(one.length for one in segments if not (one_of(one).answered and one.length == 1))
        assert prefill <= limits.prefill_tokens * limits.prompts_together

    def reply(self) -> None:
        session, epoch = self.pending.pop(self.draw.randrange(len(self.pending)))
        if session not in self.sessions or session.epoch != epoch:
            return
        if self.draw.random() < 0.02:
            self.bench.scheduler.preempt(session)
            return
        self.bench.answer(session)
        if session.finish_after(Token(TOKEN_ID, len(session.token_ids) - 1)) is not None:
            self.end(session)

    def end(self, session: Request) -> None:
        self.bench.scheduler.remove(session)
        self.sessions.remove(session)
        self.finished += 1

    def turn(self, arrivals: bool) -> None:
        self.bench.clock.advance(0.01)
        if arrivals and self.draw.random() < 0.2:
            self.arrive()
        if arrivals and self.sessions and self.draw.random() < 0.03:
            self.end(self.draw.choice(self.sessions))
        if len(self.pending) < 4:
            self.compute()
        if self.pending and self.draw.random() < 0.8:
            self.reply()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_everybody_ends_and_nothing_stays(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(200):
        simulation.turn(arrivals=True)
    turns = 0
    while simulation.sessions:
        simulation.turn(arrivals=False)
        turns += 1
        assert turns < 50_000
    assert simulation.finished > 5
    assert simulation.bench.pool.free_blocks == simulation.bench.pool.blocks
    assert not simulation.bench.scheduler.running
    assert not simulation.bench.scheduler.waiting


class TestUndecided:
    """Sessions whose route the probe reads of their first tokens, in one pass."""

    @staticmethod
    def new(tokens: int = 20) -> Request:
        return new_session(tokens, "", chain=(), candidates={"weak": ("top:1",), "strong": ("top:2",)})

    @staticmethod
    def settled(bench: SchedulerBench, session: Request, route: str = "strong") -> None:
        session.settle(RouteDecision(route))
        bench.scheduler.settled(session)

    def test_its_window_comes_in_one_pass_beyond_every_budget(self) -> None:
        bench = SchedulerBench(prefill_tokens=4, probe_tokens=12)
        session = self.new(20)
        bench.add(session)
        assert bench.take() == [(session, 0, 12)]
        self.settled(bench, session)
        assert bench.take() == [(session, 12, 4)]

    def test_a_prompt_shorter_than_the_window_comes_whole(self) -> None:
        bench = SchedulerBench(prefill_tokens=4, probe_tokens=12)
        session = self.new(7)
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.length, segment.wants_token, segment.candidates) == (7, True, ("weak", "strong"))

    def test_a_larger_budget_is_used(self) -> None:
        bench = SchedulerBench(prefill_tokens=16, probe_tokens=12)
        session = self.new(20)
        bench.add(session)
        assert bench.take() == [(session, 0, 16)]

    def test_it_passes_what_all_routes_do(self) -> None:
        bench = SchedulerBench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert segment.layers == CUTS["weak"]
        self.settled(bench, session, "weak")
        assert (session.route, session.chain, session.undecided) == ("weak", ("top:1",), False)

    def test_beside_decoding_sessions_it_comes_all_the_same(self) -> None:
        bench = SchedulerBench(prefill_tokens_beside_decode=4, probe_tokens=12, groups=1)
        (decoding,) = bench.decoding(3)
        session, other = self.new(), self.new()
        bench.add(session, other)
        # One a pass: a second window would delay whoever decodes once more.
        assert bench.take() == [(decoding, 3, 1), (session, 0, 12)]
        self.settled(bench, session)
        bench.answer(decoding)
        assert bench.take() == [(decoding, 4, 1), (session, 12, 8)]

    def test_it_waits_where_its_window_no_longer_fits_the_pass(self) -> None:
        bench = SchedulerBench(prefill_tokens=16, probe_tokens=12)
        first, session = new_session(10), self.new()
        bench.add(first, session)
        assert bench.take() == [(first, 0, 10)]
        assert bench.take() == [(session, 0, 16)]

    def test_it_reuses_no_beginning_and_leaves_its_own_to_its_route(self) -> None:
        bench = SchedulerBench(probe_tokens=12)
        prompt = 3 * BLOCK_TOKENS
        first, second = self.new(prompt), self.new(prompt)
        for session in (first, second):
            bench.add(session)
            assert bench.take() == [(session, 0, prompt)]
            self.settled(bench, session)
            bench.pool.publish(session.id, prompt)
        weak, strong = new_session(prompt, "weak"), new_session(prompt, "strong")
        bench.add(weak, strong)
        assert bench.take() == [(weak, 0, prompt), (strong, 2 * BLOCK_TOKENS, BLOCK_TOKENS)]

    def test_one_that_makes_room_before_its_verdict_is_judged_later(self) -> None:
        bench = SchedulerBench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        bench.take()
        bench.scheduler.preempt(session)
        bench.clock.advance(BACKOFF_SECONDS)
        assert session.undecided
        assert bench.take() == [(session, 0, 20)]

    def test_one_that_makes_room_after_its_verdict_keeps_its_route(self) -> None:
        bench = SchedulerBench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        bench.take()
        self.settled(bench, session)
        bench.scheduler.preempt(session)
        bench.clock.advance(BACKOFF_SECONDS)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.layers, segment.candidates) == (CUTS["strong"], ())
