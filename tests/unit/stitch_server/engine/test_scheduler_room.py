"""The youngest makes room, comes back later, and finds what others have left."""

from __future__ import annotations

from stitch_server.engine.scheduler import BACKOFF_SECONDS
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import new_session
from tests.support.scheduler_bench import SchedulerBench


class TestMakingRoom:
    def test_the_youngest_goes(self) -> None:
        bench = SchedulerBench(blocks=4, groups=1)
        old, young = bench.decoding(30, 30)
        for _ in range(2):
            bench.take()
            bench.answer(old, young)
        assert bench.take() == [(old, 32, 1)]
        assert bench.dropped == [young]
        assert (young.epoch, young.cached, list(bench.scheduler.waiting)) == (1, 0, [young])
        assert len(young.token_ids) == 33

    def test_the_youngest_goes_even_if_it_asks_itself(self) -> None:
        bench = SchedulerBench(blocks=3, groups=2)
        old, young = bench.decoding(16, 16)
        bench.take()
        bench.answer(old)
        assert bench.take() == []
        assert bench.dropped == [young]
        assert old.id in bench.scheduler.running

    def test_what_is_already_in_this_pass_goes_with_its_session(self) -> None:
        bench = SchedulerBench(blocks=4, groups=1)
        old, young = bench.decoding(30, 20)
        for _ in range(2):
            bench.take()
            bench.answer(old, young)
        # As if the younger one had waited longer: it goes first, and the older one needs a third block then.
        young.turn -= 1
        assert bench.take() == [(old, 32, 1)]
        assert bench.dropped == [young]

    def test_who_lost_its_room_comes_back_first(self) -> None:
        bench = SchedulerBench(blocks=4, groups=1)
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
        bench = SchedulerBench(prefill_tokens=100, prefill_tokens_beside_decode=100)
        (session,) = bench.decoding(20)
        bench.answer(session)
        bench.scheduler.preempt(session)
        bench.clock.advance(BACKOFF_SECONDS)
        (segment,) = bench.scheduler.next_segments()
        assert (segment.position, segment.length, segment.wants_token) == (0, 22, True)


class TestPostponing:
    def test_a_session_stays_away_for_a_while(self) -> None:
        bench, session = SchedulerBench(), new_session()
        bench.add(session)
        bench.take()
        bench.scheduler.preempt(session)
        assert bench.dropped == [session]
        assert bench.pool.free_blocks == 64
        assert bench.take() == []
        bench.clock.advance(BACKOFF_SECONDS * 0.9)
        assert bench.take() == []
        bench.clock.advance(BACKOFF_SECONDS * 0.2)
        assert bench.take() == [(session, 0, 20)]

    def test_the_last_to_be_postponed_stands_in_front(self) -> None:
        bench, first, second = SchedulerBench(), new_session(), new_session(first_token=50)
        bench.add(first, second)
        bench.take()
        bench.scheduler.preempt(first)
        bench.scheduler.preempt(second)
        assert list(bench.scheduler.waiting) == [second, first]


class TestReuse:
    PROMPT = 3 * BLOCK_TOKENS + 5

    def warm(self, bench: SchedulerBench, route: str = "weak") -> None:
        """One session computed this prompt and is gone."""
        session = new_session(self.PROMPT, route=route)
        bench.add(session)
        bench.take()
        bench.pool.publish(session.id, session.cached)
        bench.scheduler.remove(session)

    def test_a_known_beginning_is_not_computed_again(self) -> None:
        bench, session = SchedulerBench(), new_session(self.PROMPT)
        self.warm(bench)
        bench.add(session)
        assert bench.take() == [(session, 3 * BLOCK_TOKENS, 5)]
        assert session.reused == 3 * BLOCK_TOKENS

    def test_another_route_knows_nothing_of_it(self) -> None:
        bench, session = SchedulerBench(), new_session(self.PROMPT, route="strong")
        self.warm(bench)
        bench.add(session)
        assert bench.take() == [(session, 0, self.PROMPT)]

    def test_who_can_not_count_on_it_computes_everything(self) -> None:
        bench, session = SchedulerBench(), new_session(self.PROMPT)
        self.warm(bench)
        session.reusable = False
        bench.add(session)
        assert bench.take() == [(session, 0, self.PROMPT)]
        assert session.reused == 0

    def test_an_earlier_answer_is_computed_again(self) -> None:
        bench = SchedulerBench()
        self.warm(bench)
        session = new_session(self.PROMPT + 40, prompt_tokens=self.PROMPT)
        bench.add(session)
        assert bench.take() == [(session, 3 * BLOCK_TOKENS, 45)]
