"""The composition of a pass: decodes, then prefill, tenant by tenant; and which requests are refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from stitch.errors import Exhausted
from stitch_server.engine.request import Request
from tests.support.engine_fakes import new_request
from tests.support.scheduler_harness import LAYER_RANGES, SchedulerHarness


class TestPrefill:
    def test_empty_scheduler_has_no_work(self) -> None:
        harness = SchedulerHarness()
        assert harness.next_pass() == []
        assert not harness.scheduler.has_work

    def test_prompt_is_scheduled_in_chunks(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8), new_request(20)
        harness.add(session)
        segments = [harness.scheduler.next_segments()[0] for _ in range(3)]
        assert [(one.position, one.length) for one in segments] == [(0, 8), (8, 8), (16, 4)]
        assert [one.wants_token for one in segments] == [False, False, True]
        assert harness.next_pass() == []

    def test_segment_holds_blocks_and_layers_of_its_request(self) -> None:
        harness, session = SchedulerHarness(), new_request(20, route="strong")
        harness.add(session)
        (segment,) = harness.scheduler.next_segments()
        assert segment.blocks == harness.pool.blocks_of(session.id)
        assert (len(segment.blocks), segment.layers) == (2, LAYER_RANGES["strong"])

    def test_prompts_share_budget_of_pass(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=10)
        first, second, third = (new_request(6, first_token=100 * index) for index in range(3))
        harness.add(first, second, third)
        assert harness.next_pass() == [(first, 0, 6), (second, 0, 4)]
        assert harness.next_pass() == [(second, 4, 2), (third, 0, 6)]

    def test_prompts_are_scheduled_in_order_of_arrival(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4)
        sessions = [new_request(4, first_token=100 * index) for index in range(3)]
        harness.add(*sessions)
        assert [harness.next_pass()[0][0] for _ in range(3)] == sessions

    def test_prompt_without_free_blocks_holds_up_later_prompts(self) -> None:
        harness = SchedulerHarness(blocks=4, max_prefill_chunk=100)
        harness.decoding(30)
        harness.add(new_request(60), new_request(3))
        assert [length for _, _, length in harness.next_pass()] == [1]

    def test_pass_holds_one_chunk_of_each_prompt(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=8, max_num_batched_tokens=16)
        first, second, third = (new_request(count, first_token=100 * count) for count in (20, 5, 9))
        harness.add(first, second, third)
        assert harness.next_pass() == [(first, 0, 8), (second, 0, 5), (third, 0, 3)]
        assert harness.next_pass() == [(first, 8, 8), (third, 3, 6)]

    def test_prompt_alone_gets_one_chunk_per_pass(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, max_num_batched_tokens=32), new_request(20)
        harness.add(session)
        assert [harness.next_pass() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    @pytest.mark.parametrize(
        ("tokens", "chunks"), [(8, [8]), (9, [8, 1]), (13, [8, 4, 1]), (16, [8, 4, 4]), (24, [8, 8, 4, 4])]
    )
    def test_end_of_long_prompt_alone_is_halved(self, tokens: int, chunks: list[int]) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8), new_request(tokens)
        harness.add(session)
        assert [length for _ in chunks for _, _, length in harness.next_pass()] == chunks
        assert session.remaining == 0

    @pytest.mark.parametrize(("worth", "chunks"), [(4, [8, 8, 4, 4]), (5, [8] * 3), (20, [8] * 3)])
    def test_end_of_long_prompt_is_whole_below_min_efficient_tokens(self, worth: int, chunks: list[int]) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, min_efficient_tokens=worth), new_request(24)
        harness.add(session)
        assert [length for _ in chunks for _, _, length in harness.next_pass()] == chunks
        assert session.remaining == 0

    def test_each_waiting_prompt_adds_share_while_decoding(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=12, prefill_budget_while_decoding=5)
        (decoding,) = harness.decoding(4)
        first, second, third = (new_request(40, first_token=1_000 * index) for index in range(1, 4))
        harness.add(first, second)
        assert harness.next_pass() == [(decoding, 4, 1), (first, 0, 10)]
        harness.add(third)
        harness.answer(decoding)
        # With the one that decodes as much as if nobody did, and no more.
        assert harness.next_pass() == [(decoding, 5, 1), (first, 10, 11)]

    def test_prefill_budget_is_smaller_while_decoding(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=50, prefill_budget_while_decoding=5)
        (decoding,) = harness.decoding(4)
        prompt = new_request(30)
        harness.add(prompt)
        assert harness.next_pass() == [(decoding, 4, 1), (prompt, 0, 5)]

    @pytest.mark.parametrize(("decoding", "tokens"), [(1, 5), (2, 10), (5, 15), (12, 35), (16, 45)])
    def test_every_two_decoding_requests_add_share(self, decoding: int, tokens: int) -> None:
        harness = SchedulerHarness(max_prefill_chunk=100, prefill_budget_while_decoding=5, num_micro_batches=1)
        harness.decoding(*[1] * decoding)
        harness.add(new_request(90, first_token=5000))
        assert harness.next_pass()[-1][1:] == (0, tokens)

    @pytest.mark.parametrize(("decoding", "tokens"), [(3, 125), (31, 97), (32, 128), (40, 120)])
    def test_full_pass_with_decodes_fills_whole_tiles(self, decoding: int, tokens: int) -> None:
        harness = SchedulerHarness(
            blocks=400, max_prefill_chunk=128, prefill_budget_while_decoding=90, num_micro_batches=1
        )
        harness.decoding(*[1] * decoding)
        harness.add(*(new_request(100, first_token=5000 * index) for index in range(1, 4)))
        assert sum(length for _, _, length in harness.next_pass()) == decoding + tokens

    def test_tokens_with_long_context_cost_more_while_decoding(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=50, prefill_budget_while_decoding=12, attention_cost_per_token=24)
        (decoding,) = harness.decoding(4)
        prompt = new_request(200)
        harness.add(prompt)
        chunks = []
        while not prompt.is_decoding and len(chunks) < 100:
            (_, *chunk) = harness.next_pass()
            chunks += chunk
            harness.answer(decoding)
        # After 24 tokens of context a token costs two, after 48 three; the budget is never below one token.
        assert [(at, length) for _, at, length in chunks[:6]] == [(0, 12), (12, 8), (20, 6), (26, 5), (31, 5), (36, 4)]
        assert [length for _, _, length in chunks[-3:]] == [1, 1, 1]

    def test_tokens_cost_alike_without_decodes(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, attention_cost_per_token=2), new_request(20)
        harness.add(session)
        assert [harness.next_pass() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    def test_prefill_waits_for_decodes_in_flight(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=50, prefill_budget_while_decoding=5)
        (decoding,) = harness.decoding(4)
        prompt = new_request(30)
        harness.add(prompt)
        harness.next_pass()
        assert (harness.next_pass(), harness.scheduler.has_work) == ([], False)
        harness.answer(decoding)
        assert harness.scheduler.has_work
        assert harness.next_pass() == [(decoding, 5, 1), (prompt, 5, 5)]
        harness.scheduler.remove(decoding)
        assert harness.next_pass() == [(prompt, 10, 20)]

    def test_first_scheduled_at_is_time_of_first_pass(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=4), new_request(8)
        harness.add(session)
        harness.next_pass()
        harness.clock.advance(5.0)
        harness.next_pass()
        assert session.first_scheduled_at == 100.0


class TestDecode:
    def test_sampled_token_is_scheduled_as_decode(self) -> None:
        harness = SchedulerHarness()
        (session,) = harness.decoding(4)
        before = harness.scheduler.has_work
        assert harness.next_pass() == [(session, 4, 1)]
        assert (before, harness.scheduler.has_work) == (True, False)
        assert harness.next_pass() == []

    @pytest.mark.parametrize(
        ("num_micro_batches", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1, 1, 1, 1, 1])]
    )
    def test_decodes_are_split_into_micro_batches(self, num_micro_batches: int, sizes: list[int]) -> None:
        harness = SchedulerHarness(num_micro_batches=num_micro_batches)
        harness.decoding(4, 4, 4, 4, 4)
        assert [len(harness.next_pass()) for _ in sizes] == sizes
        assert harness.next_pass() == []

    def test_micro_batches_alternate(self) -> None:
        harness = SchedulerHarness(num_micro_batches=2)
        sessions = harness.decoding(4, 4, 4, 4)
        first = [session for session, _, _ in harness.next_pass()]
        second = [session for session, _, _ in harness.next_pass()]
        assert first + second == sessions
        harness.answer(*sessions)
        assert [session for session, _, _ in harness.next_pass()] == first

    def test_one_micro_batch_waits_for_all_replies(self) -> None:
        harness = SchedulerHarness(num_micro_batches=1)
        one, other = harness.decoding(4, 4)
        harness.next_pass()
        prompt = new_request(5)
        harness.add(prompt)
        harness.answer(one)
        assert (harness.scheduler.has_work, harness.next_pass()) == (False, [])
        harness.answer(other)
        assert harness.scheduler.has_work
        assert [session for session, _, _ in harness.next_pass()] == [one, other, prompt]

    def test_chunks_of_prompt_do_not_wait_for_replies(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4, num_micro_batches=1)
        harness.add(new_request(10))
        assert [harness.next_pass()[0][1:] for _ in range(3)] == [(0, 4), (4, 4), (8, 2)]

    def test_least_recently_scheduled_request_decodes_first(self) -> None:
        harness = SchedulerHarness(num_micro_batches=2)
        a, b, c, d = harness.decoding(4, 4, 4, 4)
        harness.next_pass()
        harness.answer(a, b)
        assert [session for session, _, _ in harness.next_pass()] == [c, d]

    def test_decodes_precede_prefill(self) -> None:
        harness = SchedulerHarness(num_micro_batches=1)
        decoding = harness.decoding(4, 4)
        prompt = new_request(5)
        harness.add(prompt)
        assert [session for session, _, _ in harness.next_pass()] == [*decoding, prompt]


class TestAdmission:
    def test_prompt_larger_than_kv_cache_is_refused(self) -> None:
        harness = SchedulerHarness(blocks=2)
        with pytest.raises(Exhausted, match="the prompt has 32 tokens, but the KV cache holds 32") as caught:
            harness.add(new_request(32))
        assert caught.value.retry_after_seconds == 60.0

    def test_largest_prompt_that_fits_is_admitted(self) -> None:
        harness = SchedulerHarness(blocks=2)
        harness.add(new_request(31))
        assert sum(length for _, _, length in harness.next_pass()) == 31

    def test_request_beyond_max_waiting_sessions_is_refused(self) -> None:
        harness = SchedulerHarness(max_waiting_sessions=2)
        harness.add(new_request(), new_request())
        with pytest.raises(Exhausted, match="2 sessions wait already"):
            harness.add(new_request())
        assert len(harness.scheduler.waiting) == 2

    def test_kv_cache_limits_context_length(self) -> None:
        harness, session = SchedulerHarness(blocks=2), new_request(20)
        harness.add(session)
        assert session.context_length == 32
        short = new_request(20, context_length=25)
        harness.add(short)
        assert short.context_length == 25


class TestRemove:
    def test_running_request_frees_its_blocks(self) -> None:
        harness, session = SchedulerHarness(), new_request()
        harness.add(session)
        harness.next_pass()
        harness.scheduler.remove(session)
        harness.scheduler.remove(session)
        assert (harness.scheduler.running, harness.pool.free_blocks, harness.closed_downstream) == ({}, 64, [])

    def test_waiting_request_leaves_queue(self) -> None:
        harness, session, other = SchedulerHarness(), new_request(), new_request()
        harness.add(session, other)
        harness.scheduler.remove(session)
        assert list(harness.scheduler.waiting) == [other]

    def test_unknown_request_has_no_effect(self) -> None:
        harness = SchedulerHarness()
        harness.scheduler.remove(new_request())
        assert harness.next_pass() == []


class TestTenants:
    """Tenants share the first shard by weight, counted in parameters read."""

    def serve(self, harness: SchedulerHarness, passes: int, answer_tokens: int = 3) -> Counter[str]:
        """Runs passes of which every prompt gets an answer; returns the computed tokens by tenant."""
        computed = Counter[str]()
        for _ in range(passes):
            for request, _, length in harness.next_pass():
                computed[request.tenant] += length
                if not request.remaining:
                    harness.answer(request)
                if request.generated > answer_tokens:
                    harness.scheduler.remove(request)
        return computed

    @pytest.mark.parametrize("weight", [1.0, 3.0])
    def test_computed_tokens_are_in_proportion_to_weights(self, weight: float) -> None:
        harness = SchedulerHarness(blocks=8, max_waiting_sessions=1000)
        for number in range(400):
            harness.add(new_request(20, tenant="one", first_token=40 * number))
            harness.add(new_request(20, tenant="two", first_token=40 * number, tenant_weight=weight))
        computed = self.serve(harness, 300)
        assert len(harness.scheduler.waiting) > 100
        assert computed["two"] / computed["one"] == pytest.approx(weight, rel=0.1)

    def test_costlier_route_counts_more(self) -> None:
        harness = SchedulerHarness(blocks=8, max_waiting_sessions=1000, route_costs={"weak": 1.0, "strong": 2.0})
        for number in range(400):
            harness.add(new_request(20, "weak", tenant="one", first_token=40 * number))
            harness.add(new_request(20, "strong", tenant="two", first_token=40 * number))
        computed = self.serve(harness, 300)
        assert computed["one"] / computed["two"] == pytest.approx(2.0, rel=0.1)

    def test_request_does_not_wait_for_many_of_another_tenant(self) -> None:
        harness = SchedulerHarness(blocks=512, max_waiting_sessions=1000, num_micro_batches=1)
        for number in range(330):
            harness.add(new_request(400, tenant="many", first_token=1000 * number))
        self.serve(harness, 5)
        other = new_request(60, tenant="one")
        harness.add(other)
        assert (other, 0, 60) in harness.next_pass()

    def test_prompt_of_another_tenant_goes_before_the_rest_of_a_long_one(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=64)
        long, short = new_request(600, tenant="one"), new_request(20, tenant="two")
        harness.add(long)
        harness.next_pass()
        harness.add(short)
        assert harness.next_pass() == [(short, 0, 20), (long, 64, 44)]

    def answering(self, harness: SchedulerHarness, count: int) -> list[Request]:
        """Requests of the tenant `many` whose first token has come, after another tenant was served last."""
        requests = [new_request(20, tenant="many", first_token=100 * number) for number in range(count)]
        harness.add(*requests)
        while any(request.remaining for request in requests):
            harness.next_pass()
        harness.answer(*requests)
        return requests

    def test_prompt_goes_before_answers_of_a_tenant_that_was_given_more(self) -> None:
        harness = SchedulerHarness(num_micro_batches=1, max_num_batched_tokens=256)
        answering = self.answering(harness, 4)
        # Their step is in flight.
        assert len(harness.next_pass()) == 4
        other, more = new_request(30, tenant="one"), new_request(30, tenant="many", first_token=1000)
        harness.add(more, other)
        assert harness.next_pass() == [(other, 0, 30)]
        harness.answer(*answering)
        assert harness.next_pass() == []
        harness.answer(other)
        assert {one for one, _, _ in harness.next_pass()} == {*answering, other, more}

    def test_prompts_go_before_answers_in_every_second_pass_at_most(self) -> None:
        harness = SchedulerHarness(num_micro_batches=1, max_num_batched_tokens=256)
        answering = self.answering(harness, 4)
        first, second = new_request(30, tenant="one"), new_request(30, tenant="two", first_token=1000)
        harness.add(first)
        assert harness.next_pass() == [(first, 0, 30)]
        harness.answer(first)
        harness.add(second)
        taken = harness.next_pass()
        assert {one for one, _, _ in taken} == {*answering, first, second}

    @pytest.mark.parametrize("fields", [{"tenant": "many"}, {"tenant": "one", "num_micro_batches": 2}])
    def test_prompt_of_the_same_tenant_or_beside_micro_batches_joins_the_answers(self, fields: dict[str, Any]) -> None:
        harness = SchedulerHarness(num_micro_batches=fields.pop("num_micro_batches", 1), max_num_batched_tokens=256)
        answering = self.answering(harness, 2)
        request = new_request(30, first_token=1000, **fields)
        harness.add(request)
        taken = {one for one, _, _ in harness.next_pass()}
        assert request in taken
        assert taken & set(answering)

    def test_tenant_alone_gets_all(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=64)
        harness.decoding(20)
        requests = [new_request(20, tenant="one", first_token=100 * number) for number in range(1, 4)]
        harness.add(*requests)
        taken = [one for one, _, _ in harness.next_pass() + harness.next_pass()]
        assert set(requests) <= set(taken)
