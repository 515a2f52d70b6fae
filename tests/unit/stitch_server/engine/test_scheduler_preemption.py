"""The youngest makes room, comes back later, and finds what others have left."""

from __future__ import annotations

from stitch_server.engine.scheduler import BACKOFF_SECONDS
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import new_request
from tests.support.scheduler_harness import SchedulerHarness


class TestMakingRoom:
    def test_the_youngest_goes(self) -> None:
        harness = SchedulerHarness(blocks=4, num_micro_batches=1)
        old, young = harness.decoding(30, 30)
        for _ in range(2):
            harness.next_pass()
            harness.answer(old, young)
        assert harness.next_pass() == [(old, 32, 1)]
        assert harness.closed_downstream == [young]
        assert (young.epoch, young.cached, list(harness.scheduler.waiting)) == (1, 0, [young])
        assert len(young.token_ids) == 33

    def test_the_youngest_goes_even_if_it_asks_itself(self) -> None:
        harness = SchedulerHarness(blocks=3, num_micro_batches=2)
        old, young = harness.decoding(16, 16)
        harness.next_pass()
        harness.answer(old)
        assert harness.next_pass() == []
        assert harness.closed_downstream == [young]
        assert old.id in harness.scheduler.running

    def test_what_is_already_in_this_pass_goes_with_its_session(self) -> None:
        harness = SchedulerHarness(blocks=4, num_micro_batches=1)
        old, young = harness.decoding(30, 20)
        for _ in range(2):
            harness.next_pass()
            harness.answer(old, young)
        # As if the younger one had waited longer: it goes first, and the older one needs a third block then.
        young.last_pass -= 1
        assert harness.next_pass() == [(old, 32, 1)]
        assert harness.closed_downstream == [young]

    def test_who_lost_its_room_comes_back_first(self) -> None:
        harness = SchedulerHarness(blocks=4, num_micro_batches=1)
        old, young = harness.decoding(30, 30)
        later = new_request(3, first_token=900)
        harness.add(later)
        for _ in range(2):
            harness.next_pass()
            harness.answer(old, young)
        harness.next_pass()
        assert list(harness.scheduler.waiting) == [young, later]
        harness.scheduler.remove(old)
        assert harness.next_pass() == []
        harness.clock.advance(BACKOFF_SECONDS)
        assert harness.next_pass()[0][0] is young

    def test_it_computes_again_what_it_knows(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=100, prefill_budget_while_decoding=100)
        (session,) = harness.decoding(20)
        harness.answer(session)
        harness.scheduler.preempt(session)
        harness.clock.advance(BACKOFF_SECONDS)
        (segment,) = harness.scheduler.next_segments()
        assert (segment.position, segment.length, segment.wants_token) == (0, 22, True)


class TestPostponing:
    def test_a_session_stays_away_for_a_while(self) -> None:
        harness, session = SchedulerHarness(), new_request()
        harness.add(session)
        harness.next_pass()
        harness.scheduler.preempt(session)
        assert harness.closed_downstream == [session]
        assert harness.pool.free_blocks == 64
        assert harness.next_pass() == []
        harness.clock.advance(BACKOFF_SECONDS * 0.9)
        assert harness.next_pass() == []
        harness.clock.advance(BACKOFF_SECONDS * 0.2)
        assert harness.next_pass() == [(session, 0, 20)]

    def test_the_last_to_be_postponed_stands_in_front(self) -> None:
        harness, first, second = SchedulerHarness(), new_request(), new_request(first_token=50)
        harness.add(first, second)
        harness.next_pass()
        harness.scheduler.preempt(first)
        harness.scheduler.preempt(second)
        assert list(harness.scheduler.waiting) == [second, first]


class TestReuse:
    PROMPT = 3 * BLOCK_TOKENS + 5

    def warm(self, harness: SchedulerHarness, route: str = "weak") -> None:
        """One session computed this prompt and is gone."""
        session = new_request(self.PROMPT, route=route)
        harness.add(session)
        harness.next_pass()
        harness.pool.publish(session.id, session.cached)
        harness.scheduler.remove(session)

    def test_a_known_beginning_is_not_computed_again(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT)
        self.warm(harness)
        harness.add(session)
        assert harness.next_pass() == [(session, 3 * BLOCK_TOKENS, 5)]
        assert session.reused == 3 * BLOCK_TOKENS

    def test_another_route_knows_nothing_of_it(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT, route="strong")
        self.warm(harness)
        harness.add(session)
        assert harness.next_pass() == [(session, 0, self.PROMPT)]

    def test_who_can_not_count_on_it_computes_everything(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT)
        self.warm(harness)
        session.skip_prefix_cache = True
        harness.add(session)
        assert harness.next_pass() == [(session, 0, self.PROMPT)]
        assert session.reused == 0

    def test_an_earlier_answer_is_computed_again(self) -> None:
        harness = SchedulerHarness()
        self.warm(harness)
        session = new_request(self.PROMPT + 40, prompt_tokens=self.PROMPT)
        harness.add(session)
        assert harness.next_pass() == [(session, 3 * BLOCK_TOKENS, 45)]
