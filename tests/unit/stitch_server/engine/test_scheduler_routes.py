"""Requests whose route the probe selects in their first pass; and a simulation in which every request ends."""

from __future__ import annotations

import random

import pytest

from stitch.sampling import Token
from stitch_server.engine.request import Request
from stitch_server.engine.types import RouteDecision, Segment
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import TOKEN_ID, new_request
from tests.support.scheduler_harness import LAYER_RANGES, SchedulerHarness, request_of


class Simulation:
    """A scheduler under random load, whose chain answers late and sometimes has no free block."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.harness = SchedulerHarness(
            blocks=self.draw.randrange(4, 12),
            max_prefill_chunk=self.draw.choice([8, 16, 40]),
            max_num_batched_tokens=self.draw.choice([8, 40, 120]),
            prefill_budget_while_decoding=self.draw.choice([1, 8]),
            num_micro_batches=self.draw.randrange(1, 4),
        )
        self.sessions: list[Request] = []
        self.pending: list[tuple[Request, int]] = []
        self.finished = 0

    def arrive(self) -> None:
        room = self.harness.pool.blocks * BLOCK_TOKENS
        tokens = self.draw.randrange(1, room)
        session = new_request(
            tokens,
            route=self.draw.choice(list(LAYER_RANGES)),
            prompt_tokens=self.draw.randrange(1, tokens + 1),
            max_tokens=self.draw.randrange(1, 60),
        )
        self.harness.add(session)
        self.sessions.append(session)

    def compute(self) -> None:
        segments = self.harness.scheduler.next_segments()
        self.check(segments)
        for segment in segments:
            session = request_of(segment)
            self.harness.pool.publish(session.id, segment.position + segment.length)
            if segment.wants_token:
                self.pending.append((session, session.epoch))

    def check(self, segments: list[Segment]) -> None:
        """The invariants of every pass."""
        scheduler, pool = self.harness.scheduler, self.harness.pool
        assert len({one.session.id for one in segments}) == len(segments)
        for segment in segments:
            assert segment.session.id in scheduler.running
            assert segment.length >= 1
            assert segment.position + segment.length == segment.session.cached
            assert len(segment.blocks) * BLOCK_TOKENS >= segment.session.cached
        held = {block for number in scheduler.running for block in pool.blocks_of(number)}
        assert pool.free_blocks == pool.blocks - len(held)
        prefill = sum(one.length for one in segments if not (request_of(one).first_token_at and one.length == 1))
        assert prefill <= self.harness.batching.max_num_batched_tokens

    def reply(self) -> None:
        session, epoch = self.pending.pop(self.draw.randrange(len(self.pending)))
        if session not in self.sessions or session.epoch != epoch:
            return
        if self.draw.random() < 0.02:
            self.harness.scheduler.preempt(session)
            return
        self.harness.answer(session)
        if session.finish_reason_at(Token(TOKEN_ID, len(session.token_ids) - 1)) is not None:
            self.end(session)

    def end(self, session: Request) -> None:
        self.harness.scheduler.remove(session)
        self.sessions.remove(session)
        self.finished += 1

    def turn(self, arrivals: bool) -> None:
        self.harness.clock.advance(0.01)
        if arrivals and self.draw.random() < 0.2:
            self.arrive()
        if arrivals and self.sessions and self.draw.random() < 0.03:
            self.end(self.draw.choice(self.sessions))
        if len(self.pending) < 4:
            self.compute()
        if self.pending and self.draw.random() < 0.8:
            self.reply()


@pytest.mark.parametrize("seed", range(12))
def test_every_request_ends_and_frees_its_blocks(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(200):
        simulation.turn(arrivals=True)
    turns = 0
    while simulation.sessions:
        simulation.turn(arrivals=False)
        turns += 1
        assert turns < 50_000
    assert simulation.finished > 5
    assert simulation.harness.pool.free_blocks == simulation.harness.pool.blocks
    assert not simulation.harness.scheduler.running
    assert not simulation.harness.scheduler.waiting


class TestRequestsWithoutRoute:
    """Requests whose route the probe selects from the hidden states of their first tokens, in one pass."""

    @staticmethod
    def new(tokens: int = 20) -> Request:
        return new_request(tokens, "", chain=(), candidates={"weak": ("top-0",), "strong": ("top-1",)})

    @staticmethod
    def settled(harness: SchedulerHarness, session: Request, route: str = "strong") -> None:
        session.take_route(RouteDecision(route))
        harness.scheduler.share_prefix(session)

    def test_probe_tokens_are_scheduled_in_one_pass_beyond_budget(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4, probe_tokens=12)
        session = self.new(20)
        harness.add(session)
        assert harness.next_pass() == [(session, 0, 12)]
        self.settled(harness, session)
        assert harness.next_pass() == [(session, 12, 4)]

    def test_prompt_shorter_than_probe_tokens_is_scheduled_whole(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4, probe_tokens=12)
        session = self.new(7)
        harness.add(session)
        (segment,) = harness.scheduler.next_segments()
        assert (segment.length, segment.wants_token, segment.candidates) == (7, True, ("weak", "strong"))

    def test_budget_above_probe_tokens_is_used(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=16, probe_tokens=12)
        session = self.new(20)
        harness.add(session)
        assert harness.next_pass() == [(session, 0, 16)]

    def test_request_without_route_gets_common_layers(self) -> None:
        harness = SchedulerHarness(probe_tokens=12)
        session = self.new()
        harness.add(session)
        (segment,) = harness.scheduler.next_segments()
        assert segment.layers == LAYER_RANGES["weak"]
        self.settled(harness, session, "weak")
        assert (session.route, session.chain, session.awaits_route) == ("weak", ("top-0",), False)

    def test_one_request_without_route_per_pass_while_decoding(self) -> None:
        harness = SchedulerHarness(prefill_budget_while_decoding=4, probe_tokens=12, num_micro_batches=1)
        (decoding,) = harness.decoding(3)
        session, other = self.new(), self.new()
        harness.add(session, other)
        # One a pass: a second window would delay the next decode step again.
        assert harness.next_pass() == [(decoding, 3, 1), (session, 0, 12)]
        self.settled(harness, session)
        harness.answer(decoding)
        assert harness.next_pass() == [(decoding, 4, 1), (session, 12, 8)]

    def test_request_without_route_waits_for_pass_with_enough_budget(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=16, probe_tokens=12)
        first, session = new_request(10), self.new()
        harness.add(first, session)
        assert harness.next_pass() == [(first, 0, 10)]
        assert harness.next_pass() == [(session, 0, 16)]

    def test_request_without_route_reuses_no_prefix_and_shares_its_own(self) -> None:
        harness = SchedulerHarness(probe_tokens=12)
        prompt = 3 * BLOCK_TOKENS
        first, second = self.new(prompt), self.new(prompt)
        for session in (first, second):
            harness.add(session)
            assert harness.next_pass() == [(session, 0, prompt)]
            self.settled(harness, session)
            harness.pool.publish(session.id, prompt)
        weak, strong = new_request(prompt, "weak"), new_request(prompt, "strong")
        harness.add(weak, strong)
        assert harness.next_pass() == [(weak, 0, prompt), (strong, 2 * BLOCK_TOKENS, BLOCK_TOKENS)]

    def test_request_preempted_before_its_decision_is_decided_later(self) -> None:
        harness = SchedulerHarness(probe_tokens=12)
        session = self.new()
        harness.add(session)
        harness.next_pass()
        harness.scheduler.preempt(session)
        assert session.awaits_route
        assert harness.next_pass() == [(session, 0, 20)]

    def test_request_preempted_after_its_decision_keeps_route(self) -> None:
        harness = SchedulerHarness(probe_tokens=12)
        session = self.new()
        harness.add(session)
        harness.next_pass()
        self.settled(harness, session)
        harness.scheduler.preempt(session)
        (segment,) = harness.scheduler.next_segments()
        assert (segment.layers, segment.candidates) == (LAYER_RANGES["strong"], ())
