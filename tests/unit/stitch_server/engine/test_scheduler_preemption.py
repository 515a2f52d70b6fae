"""Preemption of the youngest request, its recomputation, and the prefix cache."""

from __future__ import annotations

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.engine_fakes import new_request
from tests.support.scheduler_harness import SchedulerHarness


class TestPreemptionForBlocks:
    def test_youngest_request_is_preempted(self) -> None:
        harness = SchedulerHarness(blocks=4, num_micro_batches=1)
        old, young = harness.decoding(30, 30)
        for _ in range(2):
            harness.next_pass()
            harness.answer(old, young)
        assert harness.next_pass() == [(old, 32, 1)]
        assert harness.closed_downstream == [young]
        assert (young.epoch, young.cached, list(harness.scheduler.waiting)) == (1, 0, [young])
        assert len(young.token_ids) == 33

    def test_youngest_request_preempts_itself(self) -> None:
        harness = SchedulerHarness(blocks=3, num_micro_batches=2)
        old, young = harness.decoding(16, 15)
        for request in old, young, old:
            assert [one for one, _, _ in harness.next_pass()] == [request]
            harness.answer(request)
        assert harness.next_pass() == []
        assert harness.closed_downstream == [young]
        assert old.id in harness.scheduler.running

    def test_segment_of_preempted_request_leaves_pass(self) -> None:
        harness = SchedulerHarness(blocks=4, num_micro_batches=1)
        old, young = harness.decoding(30, 20)
        for _ in range(2):
            harness.next_pass()
            harness.answer(old, young)
        # As if the younger one had waited longer: it goes first, and the older one needs a third block then.
        young.last_pass -= 1
        assert harness.next_pass() == [(old, 32, 1)]
        assert harness.closed_downstream == [young]

    def test_preempted_request_is_admitted_before_waiting_ones(self) -> None:
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
        assert harness.next_pass()[0][0] is young

    def test_preempted_request_recomputes_prompt_and_generated_tokens(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=100, prefill_budget_while_decoding=100)
        (session,) = harness.decoding(20)
        harness.answer(session)
        harness.scheduler.preempt(session)
        (segment,) = harness.scheduler.next_segments()
        assert (segment.position, segment.length, segment.wants_token) == (0, 22, True)


class TestPreemptByNextShard:
    def test_preempted_request_frees_its_blocks(self) -> None:
        harness, session = SchedulerHarness(), new_request()
        harness.add(session)
        harness.next_pass()
        harness.scheduler.preempt(session)
        assert (harness.closed_downstream, harness.pool.free_blocks) == ([session], 64)
        assert harness.next_pass() == [(session, 0, 20)]

    def test_last_preempted_request_is_first_in_queue(self) -> None:
        harness, first, second = SchedulerHarness(), new_request(), new_request(first_token=50)
        harness.add(first, second)
        harness.next_pass()
        harness.scheduler.preempt(first)
        harness.scheduler.preempt(second)
        assert list(harness.scheduler.waiting) == [second, first]


class TestPrefixCache:
    PROMPT = 3 * BLOCK_TOKENS + 5

    def warm(self, harness: SchedulerHarness, route: str = "weak") -> None:
        """One request computes this prompt and ends."""
        session = new_request(self.PROMPT, route=route)
        harness.add(session)
        harness.next_pass()
        harness.pool.publish(session.id, session.cached)
        harness.scheduler.remove(session)

    def test_cached_prefix_is_not_recomputed(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT)
        self.warm(harness)
        harness.add(session)
        assert harness.next_pass() == [(session, 3 * BLOCK_TOKENS, 5)]
        assert session.reused == 3 * BLOCK_TOKENS

    def test_prefix_of_another_route_is_not_reused(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT, route="strong")
        self.warm(harness)
        harness.add(session)
        assert harness.next_pass() == [(session, 0, self.PROMPT)]

    def test_prefix_of_another_tenant_is_not_reused(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT, tenant="other")
        self.warm(harness)
        harness.add(session)
        assert harness.next_pass() == [(session, 0, self.PROMPT)]

    def test_skip_prefix_cache_recomputes_prefix(self) -> None:
        harness, session = SchedulerHarness(), new_request(self.PROMPT)
        self.warm(harness)
        session.skip_prefix_cache = True
        harness.add(session)
        assert harness.next_pass() == [(session, 0, self.PROMPT)]
        assert session.reused == 0

    def test_generated_tokens_are_not_reused(self) -> None:
        harness = SchedulerHarness()
        self.warm(harness)
        session = new_request(self.PROMPT + 40, prompt_tokens=self.PROMPT)
        harness.add(session)
        assert harness.next_pass() == [(session, 3 * BLOCK_TOKENS, 45)]
