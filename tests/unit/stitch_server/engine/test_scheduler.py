"""Which tokens come next: decode before prompts, prompts in the order of arrival; and who is not taken."""

from __future__ import annotations

import pytest

from stitch.errors import Exhausted
from tests.support.engine_fakes import new_request
from tests.support.scheduler_harness import LAYER_RANGES, SchedulerHarness


class TestPrompts:
    def test_nothing_is_scheduled_at_first(self) -> None:
        harness = SchedulerHarness()
        assert harness.next_pass() == []
        assert not harness.scheduler.has_work

    def test_a_prompt_is_cut_into_chunks(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8), new_request(20)
        harness.add(session)
        segments = [harness.scheduler.next_segments()[0] for _ in range(3)]
        assert [(one.position, one.length) for one in segments] == [(0, 8), (8, 8), (16, 4)]
        assert [one.wants_token for one in segments] == [False, False, True]
        assert harness.next_pass() == []

    def test_a_segment_says_where_its_tokens_lie(self) -> None:
        harness, session = SchedulerHarness(), new_request(20, route="strong")
        harness.add(session)
        (segment,) = harness.scheduler.next_segments()
        assert segment.blocks == harness.pool.blocks_of(session.id)
        assert (len(segment.blocks), segment.layers) == (2, LAYER_RANGES["strong"])

    def test_prompts_share_what_a_pass_may_hold(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=10)
        first, second, third = (new_request(6, first_token=100 * index) for index in range(3))
        harness.add(first, second, third)
        assert harness.next_pass() == [(first, 0, 6), (second, 0, 4)]
        assert harness.next_pass() == [(second, 4, 2), (third, 0, 6)]

    def test_who_came_first_goes_first(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4)
        sessions = [new_request(4, first_token=100 * index) for index in range(3)]
        harness.add(*sessions)
        assert [harness.next_pass()[0][0] for _ in range(3)] == sessions

    def test_a_prompt_that_does_not_fit_now_holds_up_those_behind_it(self) -> None:
        harness = SchedulerHarness(blocks=4, max_prefill_chunk=100)
        harness.decoding(30)
        harness.add(new_request(60), new_request(3))
        assert [length for _, _, length in harness.next_pass()] == [1]

    def test_several_prompts_fill_a_larger_pass_with_one_chunk_each(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=8, max_num_batched_tokens=16)
        first, second, third = (new_request(count, first_token=100 * count) for count in (20, 5, 9))
        harness.add(first, second, third)
        assert harness.next_pass() == [(first, 0, 8), (second, 0, 5), (third, 0, 3)]
        assert harness.next_pass() == [(first, 8, 8), (third, 3, 6)]

    def test_one_prompt_alone_still_comes_in_its_chunks(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, max_num_batched_tokens=32), new_request(20)
        harness.add(session)
        assert [harness.next_pass() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    @pytest.mark.parametrize(
        ("tokens", "chunks"), [(8, [8]), (9, [8, 1]), (13, [8, 4, 1]), (16, [8, 4, 4]), (24, [8, 8, 4, 4])]
    )
    def test_the_end_of_a_long_prompt_comes_in_halves(self, tokens: int, chunks: list[int]) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8), new_request(tokens)
        harness.add(session)
        assert [length for _ in chunks for _, _, length in harness.next_pass()] == chunks
        assert session.remaining == 0

    @pytest.mark.parametrize(("worth", "chunks"), [(4, [8, 8, 4, 4]), (5, [8] * 3), (20, [8] * 3)])
    def test_an_end_whose_halves_are_worth_no_pass_comes_whole(self, worth: int, chunks: list[int]) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, min_efficient_tokens=worth), new_request(24)
        harness.add(session)
        assert [length for _ in chunks for _, _, length in harness.next_pass()] == chunks
        assert session.remaining == 0

    def test_beside_decode_every_prompt_that_waits_brings_its_share(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=12, prefill_budget_while_decoding=5)
        (decoding,) = harness.decoding(4)
        first, second, third = (new_request(40, first_token=1_000 * index) for index in range(1, 4))
        harness.add(first, second)
        assert harness.next_pass() == [(decoding, 4, 1), (first, 0, 10)]
        harness.add(third)
        harness.answer(decoding)
        # With the one that decodes as much as if nobody did, and no more.
        assert harness.next_pass() == [(decoding, 5, 1), (first, 10, 11)]

    def test_beside_decode_prompts_get_less(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=50, prefill_budget_while_decoding=5)
        (decoding,) = harness.decoding(4)
        prompt = new_request(30)
        harness.add(prompt)
        assert harness.next_pass() == [(decoding, 4, 1), (prompt, 0, 5)]

    @pytest.mark.parametrize(("decoding", "tokens"), [(1, 5), (2, 10), (5, 15), (12, 35), (16, 45)])
    def test_a_crowd_that_decodes_brings_shares_too(self, decoding: int, tokens: int) -> None:
        harness = SchedulerHarness(max_prefill_chunk=100, prefill_budget_while_decoding=5, num_micro_batches=1)
        harness.decoding(*[1] * decoding)
        harness.add(new_request(90, first_token=5000))
        assert harness.next_pass()[-1][1:] == (0, tokens)

    @pytest.mark.parametrize(("decoding", "tokens"), [(3, 125), (31, 97), (32, 128), (40, 120)])
    def test_with_those_that_decode_a_full_pass_has_whole_tiles_of_rows(self, decoding: int, tokens: int) -> None:
        harness = SchedulerHarness(
            blocks=400, max_prefill_chunk=128, prefill_budget_while_decoding=90, num_micro_batches=1
        )
        harness.decoding(*[1] * decoding)
        harness.add(*(new_request(100, first_token=5000 * index) for index in range(1, 4)))
        assert sum(length for _, _, length in harness.next_pass()) == decoding + tokens

    def test_beside_decode_tokens_behind_many_count_more(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=50, prefill_budget_while_decoding=12, attention_cost_per_token=24)
        (decoding,) = harness.decoding(4)
        prompt = new_request(200)
        harness.add(prompt)
        chunks = []
        while not prompt.is_decoding and len(chunks) < 100:
            (_, *chunk) = harness.next_pass()
            chunks += chunk
            harness.answer(decoding)
        # Behind 24 each counts twice, behind 48 three times, behind very many as all that may be.
        assert [(at, length) for _, at, length in chunks[:6]] == [(0, 12), (12, 8), (20, 6), (26, 5), (31, 5), (36, 4)]
        assert [length for _, _, length in chunks[-3:]] == [1, 1, 1]

    def test_where_nobody_decodes_all_tokens_count_alike(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=8, attention_cost_per_token=2), new_request(20)
        harness.add(session)
        assert [harness.next_pass() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    def test_prompts_wait_for_the_tokens_that_are_under_way(self) -> None:
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

    def test_the_time_of_the_first_pass_is_kept(self) -> None:
        harness, session = SchedulerHarness(max_prefill_chunk=4), new_request(8)
        harness.add(session)
        harness.next_pass()
        harness.clock.advance(5.0)
        harness.next_pass()
        assert session.first_scheduled_at == 100.0


class TestDecode:
    def test_an_answered_session_feeds_its_token(self) -> None:
        harness = SchedulerHarness()
        (session,) = harness.decoding(4)
        before = harness.scheduler.has_work
        assert harness.next_pass() == [(session, 4, 1)]
        assert (before, harness.scheduler.has_work) == (True, False)
        assert harness.next_pass() == []

    @pytest.mark.parametrize(
        ("num_micro_batches", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1, 1, 1, 1, 1])]
    )
    def test_sessions_decode_in_groups(self, num_micro_batches: int, sizes: list[int]) -> None:
        harness = SchedulerHarness(num_micro_batches=num_micro_batches)
        harness.decoding(4, 4, 4, 4, 4)
        assert [len(harness.next_pass()) for _ in sizes] == sizes
        assert harness.next_pass() == []

    def test_groups_take_turns(self) -> None:
        harness = SchedulerHarness(num_micro_batches=2)
        sessions = harness.decoding(4, 4, 4, 4)
        first = [session for session, _, _ in harness.next_pass()]
        second = [session for session, _, _ in harness.next_pass()]
        assert first + second == sessions
        harness.answer(*sessions)
        assert [session for session, _, _ in harness.next_pass()] == first

    def test_one_group_takes_turns_with_the_shards_behind(self) -> None:
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

    def test_a_long_prompt_waits_for_nobody_but_decoding_sessions(self) -> None:
        harness = SchedulerHarness(max_prefill_chunk=4, num_micro_batches=1)
        harness.add(new_request(10))
        assert [harness.next_pass()[0][1:] for _ in range(3)] == [(0, 4), (4, 4), (8, 2)]

    def test_who_waited_longest_goes_first(self) -> None:
        harness = SchedulerHarness(num_micro_batches=2)
        a, b, c, d = harness.decoding(4, 4, 4, 4)
        harness.next_pass()
        harness.answer(a, b)
        assert [session for session, _, _ in harness.next_pass()] == [c, d]

    def test_decode_comes_before_prompts(self) -> None:
        harness = SchedulerHarness(num_micro_batches=1)
        decoding = harness.decoding(4, 4)
        prompt = new_request(5)
        harness.add(prompt)
        assert [session for session, _, _ in harness.next_pass()] == [*decoding, prompt]


class TestRefusals:
    def test_a_prompt_larger_than_the_cache_never_fits(self) -> None:
        harness = SchedulerHarness(blocks=2)
        with pytest.raises(Exhausted, match="the prompt has 32 tokens, but the KV cache holds 32") as caught:
            harness.add(new_request(32))
        assert caught.value.retry_after_seconds == 60.0

    def test_the_largest_that_fits_is_taken(self) -> None:
        harness = SchedulerHarness(blocks=2)
        harness.add(new_request(31))
        assert sum(length for _, _, length in harness.next_pass()) == 31

    def test_too_many_that_wait_are_refused(self) -> None:
        harness = SchedulerHarness(max_waiting_sessions=2)
        harness.add(new_request(), new_request())
        with pytest.raises(Exhausted, match="2 sessions wait already"):
            harness.add(new_request())
        assert len(harness.scheduler.waiting) == 2

    def test_the_cache_limits_the_context(self) -> None:
        harness, session = SchedulerHarness(blocks=2), new_request(20)
        harness.add(session)
        assert session.context_length == 32
        short = new_request(20, context_length=25)
        harness.add(short)
        assert short.context_length == 25


class TestEnds:
    def test_a_running_session_leaves_nothing(self) -> None:
        harness, session = SchedulerHarness(), new_request()
        harness.add(session)
        harness.next_pass()
        harness.scheduler.remove(session)
        harness.scheduler.remove(session)
        assert (harness.scheduler.running, harness.pool.free_blocks, harness.closed_downstream) == ({}, 64, [])

    def test_a_waiting_session_leaves_nothing(self) -> None:
        harness, session, other = SchedulerHarness(), new_request(), new_request()
        harness.add(session, other)
        harness.scheduler.remove(session)
        assert list(harness.scheduler.waiting) == [other]

    def test_one_that_was_never_here_does_no_harm(self) -> None:
        harness = SchedulerHarness()
        harness.scheduler.remove(new_request())
        assert harness.next_pass() == []
