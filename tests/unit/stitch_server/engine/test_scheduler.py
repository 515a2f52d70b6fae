"""Which tokens come next: decode before prompts, prompts in the order of arrival, the youngest makes room."""

from __future__ import annotations

import random

import pytest

from stitch.errors import Exhausted
from stitch_server.cache.pool import BLOCK_TOKENS, BlockPool
from stitch_server.engine.batch import Cut, Segment, Token, Verdict
from stitch_server.engine.scheduler import BACKOFF_SECONDS, Limits, Scheduler
from stitch_server.engine.session import Session
from tests.support.engine_fakes import TOKEN_ID, ManualClock, new_session

CUTS = {"weak": Cut(0, 3), "strong": Cut(0, 4)}


class Bench:
    """A scheduler, and a chain that answers whenever a test says so."""

    def __init__(self, blocks: int = 64, **limits: int) -> None:
        self.pool, self.clock = BlockPool(blocks), ManualClock()
        self.dropped: list[Session] = []
        self.scheduler = Scheduler(
            self.pool, CUTS, Limits(**{"prompts_together": 1} | limits), self.dropped.append, self.clock
        )

    def add(self, *sessions: Session) -> None:
        for session in sessions:
            self.scheduler.add(session)

    def take(self) -> list[tuple[Session, int, int]]:
        """The next pass as (session, position, length)."""
        return [(one_of(segment), segment.position, segment.length) for segment in self.scheduler.next_segments()]

    def answer(self, *sessions: Session) -> None:
        """The chain sampled a token for each of these."""
        for session in sessions:
            session.answered = True
            session.token_ids.append(TOKEN_ID)

    def decoding(self, *tokens: int) -> list[Session]:
        """Sessions with prompts of so many tokens, which are computed and answered."""
        sessions = [new_session(count, first_token=100 * index) for index, count in enumerate(tokens)]
        self.add(*sessions)
        while any(session.remaining for session in sessions):
            self.scheduler.next_segments()
        self.answer(*sessions)
        return sessions


def one_of(segment: Segment) -> Session:
    assert isinstance(segment.sequence, Session)
    return segment.sequence


class TestPrompts:
    def test_nothing_is_scheduled_at_first(self) -> None:
        bench = Bench()
        assert bench.take() == []
        assert not bench.scheduler.ready

    def test_a_prompt_is_cut_into_chunks(self) -> None:
        bench, session = Bench(prefill_tokens=8), new_session(20)
        bench.add(session)
        segments = [bench.scheduler.next_segments()[0] for _ in range(3)]
        assert [(one.position, one.length) for one in segments] == [(0, 8), (8, 8), (16, 4)]
        assert [one.wants_token for one in segments] == [False, False, True]
        assert bench.take() == []

    def test_a_segment_says_where_its_tokens_lie(self) -> None:
        bench, session = Bench(), new_session(20, route="strong")
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert segment.blocks == bench.pool.blocks_of(session.number)
        assert (len(segment.blocks), segment.cut) == (2, CUTS["strong"])

    def test_prompts_share_what_a_pass_may_hold(self) -> None:
        bench = Bench(prefill_tokens=10)
        first, second, third = (new_session(6, first_token=100 * index) for index in range(3))
        bench.add(first, second, third)
        assert bench.take() == [(first, 0, 6), (second, 0, 4)]
        assert bench.take() == [(second, 4, 2), (third, 0, 6)]

    def test_who_came_first_goes_first(self) -> None:
        bench = Bench(prefill_tokens=4)
        sessions = [new_session(4, first_token=100 * index) for index in range(3)]
        bench.add(*sessions)
        assert [bench.take()[0][0] for _ in range(3)] == sessions

    def test_a_prompt_that_does_not_fit_now_holds_up_those_behind_it(self) -> None:
        bench = Bench(blocks=4, prefill_tokens=100)
        bench.decoding(30)
        bench.add(new_session(60), new_session(3))
        assert [length for _, _, length in bench.take()] == [1]

    def test_several_prompts_fill_a_larger_pass_with_one_chunk_each(self) -> None:
        bench = Bench(prefill_tokens=8, prompts_together=2)
        first, second, third = (new_session(count, first_token=100 * count) for count in (20, 5, 9))
        bench.add(first, second, third)
        assert bench.take() == [(first, 0, 8), (second, 0, 5), (third, 0, 3)]
        assert bench.take() == [(first, 8, 8), (third, 3, 6)]

    def test_one_prompt_alone_still_comes_in_its_chunks(self) -> None:
        bench, session = Bench(prefill_tokens=8, prompts_together=4), new_session(20)
        bench.add(session)
        assert [bench.take() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    def test_beside_decode_every_prompt_that_waits_brings_its_share(self) -> None:
        bench = Bench(prefill_tokens=12, prefill_tokens_beside_decode=5)
        (decoding,) = bench.decoding(4)
        first, second, third = (new_session(40, first_token=1_000 * index) for index in range(1, 4))
        bench.add(first, second)
        assert bench.take() == [(decoding, 4, 1), (first, 0, 10)]
        bench.add(third)
        bench.answer(decoding)
        # As much as if nobody decoded, and no more.
        assert bench.take() == [(decoding, 5, 1), (first, 10, 12)]

    def test_beside_decode_prompts_get_less(self) -> None:
        bench = Bench(prefill_tokens=50, prefill_tokens_beside_decode=5)
        (decoding,) = bench.decoding(4)
        prompt = new_session(30)
        bench.add(prompt)
        assert bench.take() == [(decoding, 4, 1), (prompt, 0, 5)]

    def test_prompts_wait_for_the_tokens_that_are_under_way(self) -> None:
        bench = Bench(prefill_tokens=50, prefill_tokens_beside_decode=5)
        (decoding,) = bench.decoding(4)
        prompt = new_session(30)
        bench.add(prompt)
        bench.take()
        assert (bench.take(), bench.scheduler.ready) == ([], False)
        bench.answer(decoding)
        assert bench.scheduler.ready
        assert bench.take() == [(decoding, 5, 1), (prompt, 5, 5)]
        bench.scheduler.remove(decoding)
        assert bench.take() == [(prompt, 10, 20)]

    def test_the_time_of_the_first_pass_is_kept(self) -> None:
        bench, session = Bench(prefill_tokens=4), new_session(8)
        bench.add(session)
        bench.take()
        bench.clock.advance(5.0)
        bench.take()
        assert session.first_scheduled == 100.0


class TestDecode:
    def test_an_answered_session_feeds_its_token(self) -> None:
        bench = Bench()
        (session,) = bench.decoding(4)
        before = bench.scheduler.ready
        assert bench.take() == [(session, 4, 1)]
        assert (before, bench.scheduler.ready) == (True, False)
        assert bench.take() == []

    @pytest.mark.parametrize(("groups", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1, 1, 1, 1, 1])])
    def test_sessions_decode_in_groups(self, groups: int, sizes: list[int]) -> None:
        bench = Bench(groups=groups)
        bench.decoding(4, 4, 4, 4, 4)
        assert [len(bench.take()) for _ in sizes] == sizes
        assert bench.take() == []

    def test_groups_take_turns(self) -> None:
        bench = Bench(groups=2)
        sessions = bench.decoding(4, 4, 4, 4)
        first = [session for session, _, _ in bench.take()]
        second = [session for session, _, _ in bench.take()]
        assert first + second == sessions
        bench.answer(*sessions)
        assert [session for session, _, _ in bench.take()] == first

    def test_who_waited_longest_goes_first(self) -> None:
        bench = Bench(groups=2)
        a, b, c, d = bench.decoding(4, 4, 4, 4)
        bench.take()
        bench.answer(a, b)
        assert [session for session, _, _ in bench.take()] == [c, d]

    def test_decode_comes_before_prompts(self) -> None:
        bench = Bench(groups=1)
        decoding = bench.decoding(4, 4)
        prompt = new_session(5)
        bench.add(prompt)
        assert [session for session, _, _ in bench.take()] == [*decoding, prompt]


class TestRefusals:
    def test_a_prompt_larger_than_the_cache_never_fits(self) -> None:
        bench = Bench(blocks=2)
        with pytest.raises(Exhausted, match="the prompt has 32 tokens, but the KV cache holds 32") as caught:
            bench.add(new_session(32))
        assert caught.value.retry_after_seconds == 60.0

    def test_the_largest_that_fits_is_taken(self) -> None:
        bench = Bench(blocks=2)
        bench.add(new_session(31))
        assert sum(length for _, _, length in bench.take()) == 31

    def test_too_many_that_wait_are_refused(self) -> None:
        bench = Bench(max_waiting_sessions=2)
        bench.add(new_session(), new_session())
        with pytest.raises(Exhausted, match="2 sessions wait already"):
            bench.add(new_session())
        assert len(bench.scheduler.waiting) == 2

    def test_the_cache_limits_the_context(self) -> None:
        bench, session = Bench(blocks=2), new_session(20)
        bench.add(session)
        assert session.context_length == 32
        short = new_session(20, context_length=25)
        bench.add(short)
        assert short.context_length == 25


class TestMakingRoom:
    def test_the_youngest_goes(self) -> None:
        bench = Bench(blocks=4, groups=1)
        old, young = bench.decoding(30, 30)
        for _ in range(2):
            bench.take()
            bench.answer(old, young)
        assert bench.take() == [(old, 32, 1)]
        assert bench.dropped == [young]
        assert (young.epoch, young.cached, list(bench.scheduler.waiting)) == (1, 0, [young])
        assert len(young.token_ids) == 33

    def test_the_youngest_goes_even_if_it_asks_itself(self) -> None:
        bench = Bench(blocks=3, groups=2)
        old, young = bench.decoding(16, 16)
        bench.take()
        bench.answer(old)
        assert bench.take() == []
        assert bench.dropped == [young]
        assert old.number in bench.scheduler.running

    def test_what_is_already_in_this_pass_goes_with_its_session(self) -> None:
        bench = Bench(blocks=4, groups=1)
        old, young = bench.decoding(30, 20)
        bench.take()
        bench.answer(old)
        bench.take()
        bench.answer(old, young)
        # The younger one waited longer and goes first; the older one needs a third block then.
        assert young.turn < old.turn
        assert bench.take() == [(old, 32, 1)]
        assert bench.dropped == [young]

    def test_who_lost_its_room_comes_back_first(self) -> None:
        bench = Bench(blocks=4, groups=1)
        old, young = bench.decoding(30, 30)
        later = new_session(3, first_token=900)
        bench.add(later)
        for _ in range(2):
            bench.take()
            bench.answer(old, young)
        bench.take()
        assert list(bench.scheduler.waiting) == [young, later]
        bench.scheduler.remove(old)
        assert bench.take() == []
        bench.clock.advance(BACKOFF_SECONDS)
        assert bench.take()[0][0] is young

    def test_it_computes_again_what_it_knows(self) -> None:
        bench = Bench(prefill_tokens=100, prefill_tokens_beside_decode=100)
        (session,) = bench.decoding(20)
        bench.answer(session)
        bench.scheduler.postpone(session)
        bench.clock.advance(BACKOFF_SECONDS)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.position, segment.length, segment.wants_token) == (0, 22, True)


class TestPostponing:
    def test_a_session_stays_away_for_a_while(self) -> None:
        bench, session = Bench(), new_session()
        bench.add(session)
        bench.take()
        bench.scheduler.postpone(session)
        assert bench.dropped == [session]
        assert bench.pool.free_blocks == 64
        assert bench.take() == []
        bench.clock.advance(BACKOFF_SECONDS * 0.9)
        assert bench.take() == []
        bench.clock.advance(BACKOFF_SECONDS * 0.2)
        assert bench.take() == [(session, 0, 20)]

    def test_the_last_to_be_postponed_stands_in_front(self) -> None:
        bench, first, second = Bench(), new_session(), new_session(first_token=50)
        bench.add(first, second)
        bench.take()
        bench.scheduler.postpone(first)
        bench.scheduler.postpone(second)
        assert list(bench.scheduler.waiting) == [second, first]


class TestReuse:
    PROMPT = 3 * BLOCK_TOKENS + 5

    def warm(self, bench: Bench, route: str = "weak") -> None:
        """One session computed this prompt and is gone."""
        session = new_session(self.PROMPT, route=route)
        bench.add(session)
        bench.take()
        bench.pool.publish(session.number, session.cached)
        bench.scheduler.remove(session)

    def test_a_known_beginning_is_not_computed_again(self) -> None:
        bench, session = Bench(), new_session(self.PROMPT)
        self.warm(bench)
        bench.add(session)
        assert bench.take() == [(session, 3 * BLOCK_TOKENS, 5)]
        assert session.reused == 3 * BLOCK_TOKENS

    def test_another_route_knows_nothing_of_it(self) -> None:
        bench, session = Bench(), new_session(self.PROMPT, route="strong")
        self.warm(bench)
        bench.add(session)
        assert bench.take() == [(session, 0, self.PROMPT)]

    def test_who_can_not_count_on_it_computes_everything(self) -> None:
        bench, session = Bench(), new_session(self.PROMPT)
        self.warm(bench)
        session.reusable = False
        bench.add(session)
        assert bench.take() == [(session, 0, self.PROMPT)]
        assert session.reused == 0

    def test_an_earlier_answer_is_computed_again(self) -> None:
        bench = Bench()
        self.warm(bench)
        session = new_session(self.PROMPT + 40, prompt_tokens=self.PROMPT)
        bench.add(session)
        assert bench.take() == [(session, 3 * BLOCK_TOKENS, 45)]


class TestEnds:
    def test_a_running_session_leaves_nothing(self) -> None:
        bench, session = Bench(), new_session()
        bench.add(session)
        bench.take()
        bench.scheduler.remove(session)
        bench.scheduler.remove(session)
        assert (bench.scheduler.running, bench.pool.free_blocks, bench.dropped) == ({}, 64, [])

    def test_a_waiting_session_leaves_nothing(self) -> None:
        bench, session, other = Bench(), new_session(), new_session()
        bench.add(session, other)
        bench.scheduler.remove(session)
        assert list(bench.scheduler.waiting) == [other]

    def test_one_that_was_never_here_does_no_harm(self) -> None:
        bench = Bench()
        bench.scheduler.remove(new_session())
        assert bench.take() == []


class Simulation:
    """A scheduler under random load, whose chain answers late, and sometimes has no room itself."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.bench = Bench(
            blocks=self.draw.randrange(4, 12),
            prefill_tokens=self.draw.choice([8, 16, 40]),
            prompts_together=self.draw.choice([1, 3]),
            prefill_tokens_beside_decode=self.draw.choice([1, 8]),
            groups=self.draw.randrange(1, 4),
        )
        self.sessions: list[Session] = []
        self.pending: list[tuple[Session, int]] = []
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
            self.bench.pool.publish(session.number, segment.position + segment.length)
            if segment.wants_token:
                self.pending.append((session, session.epoch))

    def check(self, segments: list[Segment]) -> None:
        """What must hold of every pass."""
        scheduler, pool = self.bench.scheduler, self.bench.pool
        assert len({one.sequence.number for one in segments}) == len(segments)
        for segment in segments:
            assert segment.sequence.number in scheduler.running
            assert segment.length >= 1
            assert segment.position + segment.length == segment.sequence.cached
            assert len(segment.blocks) * BLOCK_TOKENS >= segment.sequence.cached
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
            self.bench.scheduler.postpone(session)
            return
        self.bench.answer(session)
        if session.finish_after(Token(TOKEN_ID, len(session.token_ids) - 1)) is not None:
            self.end(session)

    def end(self, session: Session) -> None:
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
    def new(tokens: int = 20) -> Session:
        return new_session(tokens, "", chain=(), candidates={"weak": ("top:1",), "strong": ("top:2",)})

    @staticmethod
    def settled(bench: Bench, session: Session, route: str = "strong") -> None:
        session.settle(Verdict(route))
        bench.scheduler.settled(session)

    def test_its_window_comes_in_one_pass_beyond_every_budget(self) -> None:
        bench = Bench(prefill_tokens=4, probe_tokens=12)
        session = self.new(20)
        bench.add(session)
        assert bench.take() == [(session, 0, 12)]
        self.settled(bench, session)
        assert bench.take() == [(session, 12, 4)]

    def test_a_prompt_shorter_than_the_window_comes_whole(self) -> None:
        bench = Bench(prefill_tokens=4, probe_tokens=12)
        session = self.new(7)
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.length, segment.wants_token, segment.candidates) == (7, True, ("weak", "strong"))

    def test_a_larger_budget_is_used(self) -> None:
        bench = Bench(prefill_tokens=16, probe_tokens=12)
        session = self.new(20)
        bench.add(session)
        assert bench.take() == [(session, 0, 16)]

    def test_it_passes_what_all_routes_do(self) -> None:
        bench = Bench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert segment.cut == CUTS["weak"]
        self.settled(bench, session, "weak")
        assert (session.route, session.chain, session.undecided) == ("weak", ("top:1",), False)

    def test_beside_decoding_sessions_it_comes_all_the_same(self) -> None:
        bench = Bench(prefill_tokens_beside_decode=4, probe_tokens=12, groups=1)
        (decoding,) = bench.decoding(3)
        session, other = self.new(), self.new()
        bench.add(session, other)
        # One a pass: a second window would delay whoever decodes once more.
        assert bench.take() == [(decoding, 3, 1), (session, 0, 12)]
        self.settled(bench, session)
        bench.answer(decoding)
        assert bench.take() == [(decoding, 4, 1), (session, 12, 8)]

    def test_it_waits_where_its_window_no_longer_fits_the_pass(self) -> None:
        bench = Bench(prefill_tokens=16, probe_tokens=12)
        first, session = new_session(10), self.new()
        bench.add(first, session)
        assert bench.take() == [(first, 0, 10)]
        assert bench.take() == [(session, 0, 16)]

    def test_it_reuses_no_beginning_and_leaves_its_own_to_its_route(self) -> None:
        bench = Bench(probe_tokens=12)
        prompt = 3 * BLOCK_TOKENS
        first, second = self.new(prompt), self.new(prompt)
        for session in (first, second):
            bench.add(session)
            assert bench.take() == [(session, 0, prompt)]
            self.settled(bench, session)
            bench.pool.publish(session.number, prompt)
        weak, strong = new_session(prompt, "weak"), new_session(prompt, "strong")
        bench.add(weak, strong)
        assert bench.take() == [(weak, 0, prompt), (strong, 2 * BLOCK_TOKENS, BLOCK_TOKENS)]

    def test_one_that_makes_room_before_its_verdict_is_judged_later(self) -> None:
        bench = Bench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        bench.take()
        bench.scheduler.postpone(session)
        bench.clock.advance(BACKOFF_SECONDS)
        assert session.undecided
        assert bench.take() == [(session, 0, 20)]

    def test_one_that_makes_room_after_its_verdict_keeps_its_route(self) -> None:
        bench = Bench(probe_tokens=12)
        session = self.new()
        bench.add(session)
        bench.take()
        self.settled(bench, session)
        bench.scheduler.postpone(session)
        bench.clock.advance(BACKOFF_SECONDS)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.cut, segment.candidates) == (CUTS["strong"], ())
