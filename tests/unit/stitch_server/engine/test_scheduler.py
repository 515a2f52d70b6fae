"""Which tokens come next: decode before prompts, prompts in the order of arrival; and who is not taken."""

from __future__ import annotations

import pytest

from stitch.errors import Exhausted
from tests.support.engine_fakes import new_session
from tests.support.scheduler_bench import CUTS, SchedulerBench


class TestPrompts:
    def test_nothing_is_scheduled_at_first(self) -> None:
        bench = SchedulerBench()
        assert bench.take() == []
        assert not bench.scheduler.ready

    def test_a_prompt_is_cut_into_chunks(self) -> None:
        bench, session = SchedulerBench(prefill_tokens=8), new_session(20)
        bench.add(session)
        segments = [bench.scheduler.next_segments()[0] for _ in range(3)]
        assert [(one.position, one.length) for one in segments] == [(0, 8), (8, 8), (16, 4)]
        assert [one.wants_token for one in segments] == [False, False, True]
        assert bench.take() == []

    def test_a_segment_says_where_its_tokens_lie(self) -> None:
        bench, session = SchedulerBench(), new_session(20, route="strong")
        bench.add(session)
        (segment,) = bench.scheduler.next_segments()
        assert segment.blocks == bench.pool.blocks_of(session.id)
        assert (len(segment.blocks), segment.layers) == (2, CUTS["strong"])

    def test_prompts_share_what_a_pass_may_hold(self) -> None:
        bench = SchedulerBench(prefill_tokens=10)
        first, second, third = (new_session(6, first_token=100 * index) for index in range(3))
        bench.add(first, second, third)
        assert bench.take() == [(first, 0, 6), (second, 0, 4)]
        assert bench.take() == [(second, 4, 2), (third, 0, 6)]

    def test_who_came_first_goes_first(self) -> None:
        bench = SchedulerBench(prefill_tokens=4)
        sessions = [new_session(4, first_token=100 * index) for index in range(3)]
        bench.add(*sessions)
        assert [bench.take()[0][0] for _ in range(3)] == sessions

    def test_a_prompt_that_does_not_fit_now_holds_up_those_behind_it(self) -> None:
        bench = SchedulerBench(blocks=4, prefill_tokens=100)
        bench.decoding(30)
        bench.add(new_session(60), new_session(3))
        assert [length for _, _, length in bench.take()] == [1]

    def test_several_prompts_fill_a_larger_pass_with_one_chunk_each(self) -> None:
        bench = SchedulerBench(prefill_tokens=8, prompts_together=2)
        first, second, third = (new_session(count, first_token=100 * count) for count in (20, 5, 9))
        bench.add(first, second, third)
        assert bench.take() == [(first, 0, 8), (second, 0, 5), (third, 0, 3)]
        assert bench.take() == [(first, 8, 8), (third, 3, 6)]

    def test_one_prompt_alone_still_comes_in_its_chunks(self) -> None:
        bench, session = SchedulerBench(prefill_tokens=8, prompts_together=4), new_session(20)
        bench.add(session)
        assert [bench.take() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    @pytest.mark.parametrize(
        ("tokens", "chunks"), [(8, [8]), (9, [8, 1]), (13, [8, 4, 1]), (16, [8, 4, 4]), (24, [8, 8, 4, 4])]
    )
    def test_the_end_of_a_long_prompt_comes_in_halves(self, tokens: int, chunks: list[int]) -> None:
        bench, session = SchedulerBench(prefill_tokens=8), new_session(tokens)
        bench.add(session)
        assert [length for _ in chunks for _, _, length in bench.take()] == chunks
        assert session.remaining == 0

    @pytest.mark.parametrize(("worth", "chunks"), [(4, [8, 8, 4, 4]), (5, [8] * 3), (20, [8] * 3)])
    def test_an_end_whose_halves_are_worth_no_pass_comes_whole(self, worth: int, chunks: list[int]) -> None:
        bench, session = SchedulerBench(prefill_tokens=8, min_efficient_tokens=worth), new_session(24)
        bench.add(session)
        assert [length for _ in chunks for _, _, length in bench.take()] == chunks
        assert session.remaining == 0

    def test_beside_decode_every_prompt_that_waits_brings_its_share(self) -> None:
        bench = SchedulerBench(prefill_tokens=12, prefill_tokens_beside_decode=5)
        (decoding,) = bench.decoding(4)
        first, second, third = (new_session(40, first_token=1_000 * index) for index in range(1, 4))
        bench.add(first, second)
        assert bench.take() == [(decoding, 4, 1), (first, 0, 10)]
        bench.add(third)
        bench.answer(decoding)
        # With the one that decodes as much as if nobody did, and no more.
        assert bench.take() == [(decoding, 5, 1), (first, 10, 11)]

    def test_beside_decode_prompts_get_less(self) -> None:
        bench = SchedulerBench(prefill_tokens=50, prefill_tokens_beside_decode=5)
        (decoding,) = bench.decoding(4)
        prompt = new_session(30)
        bench.add(prompt)
        assert bench.take() == [(decoding, 4, 1), (prompt, 0, 5)]

    @pytest.mark.parametrize(("decoding", "tokens"), [(1, 5), (2, 10), (5, 15), (12, 35), (16, 45)])
    def test_a_crowd_that_decodes_brings_shares_too(self, decoding: int, tokens: int) -> None:
        bench = SchedulerBench(prefill_tokens=100, prefill_tokens_beside_decode=5, groups=1)
        bench.decoding(*[1] * decoding)
        bench.add(new_session(90, first_token=5000))
        assert bench.take()[-1][1:] == (0, tokens)

    @pytest.mark.parametrize(("decoding", "tokens"), [(3, 125), (31, 97), (32, 128), (40, 120)])
    def test_with_those_that_decode_a_full_pass_has_whole_tiles_of_rows(self, decoding: int, tokens: int) -> None:
        bench = SchedulerBench(blocks=400, prefill_tokens=128, prefill_tokens_beside_decode=90, groups=1)
        bench.decoding(*[1] * decoding)
        bench.add(*(new_session(100, first_token=5000 * index) for index in range(1, 4)))
        assert sum(length for _, _, length in bench.take()) == decoding + tokens

    def test_beside_decode_tokens_behind_many_count_more(self) -> None:
        bench = SchedulerBench(prefill_tokens=50, prefill_tokens_beside_decode=12, attention_cost_per_token=24)
        (decoding,) = bench.decoding(4)
        prompt = new_session(200)
        bench.add(prompt)
        chunks = []
        while not prompt.decoding and len(chunks) < 100:
            (_, *chunk) = bench.take()
            chunks += chunk
            bench.answer(decoding)
        # Behind 24 each counts twice, behind 48 three times, behind very many as all that may be.
        assert [(at, length) for _, at, length in chunks[:6]] == [(0, 12), (12, 8), (20, 6), (26, 5), (31, 5), (36, 4)]
        assert [length for _, _, length in chunks[-3:]] == [1, 1, 1]

    def test_where_nobody_decodes_all_tokens_count_alike(self) -> None:
        bench, session = SchedulerBench(prefill_tokens=8, attention_cost_per_token=2), new_session(20)
        bench.add(session)
        assert [bench.take() for _ in range(3)] == [[(session, 0, 8)], [(session, 8, 8)], [(session, 16, 4)]]

    def test_prompts_wait_for_the_tokens_that_are_under_way(self) -> None:
        bench = SchedulerBench(prefill_tokens=50, prefill_tokens_beside_decode=5)
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
        bench, session = SchedulerBench(prefill_tokens=4), new_session(8)
        bench.add(session)
        bench.take()
        bench.clock.advance(5.0)
        bench.take()
        assert session.first_scheduled == 100.0


class TestDecode:
    def test_an_answered_session_feeds_its_token(self) -> None:
        bench = SchedulerBench()
        (session,) = bench.decoding(4)
        before = bench.scheduler.ready
        assert bench.take() == [(session, 4, 1)]
        assert (before, bench.scheduler.ready) == (True, False)
        assert bench.take() == []

    @pytest.mark.parametrize(("groups", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1, 1, 1, 1, 1])])
    def test_sessions_decode_in_groups(self, groups: int, sizes: list[int]) -> None:
        bench = SchedulerBench(groups=groups)
        bench.decoding(4, 4, 4, 4, 4)
        assert [len(bench.take()) for _ in sizes] == sizes
        assert bench.take() == []

    def test_groups_take_turns(self) -> None:
        bench = SchedulerBench(groups=2)
        sessions = bench.decoding(4, 4, 4, 4)
        first = [session for session, _, _ in bench.take()]
        second = [session for session, _, _ in bench.take()]
        assert first + second == sessions
        bench.answer(*sessions)
        assert [session for session, _, _ in bench.take()] == first

    def test_one_group_takes_turns_with_the_shards_behind(self) -> None:
        bench = SchedulerBench(groups=1)
        one, other = bench.decoding(4, 4)
        bench.take()
        prompt = new_session(5)
        bench.add(prompt)
        bench.answer(one)
        assert (bench.scheduler.ready, bench.take()) == (False, [])
        bench.answer(other)
        assert bench.scheduler.ready
        assert [session for session, _, _ in bench.take()] == [one, other, prompt]

    def test_a_long_prompt_waits_for_nobody_but_decoding_sessions(self) -> None:
        bench = SchedulerBench(prefill_tokens=4, groups=1)
        bench.add(new_session(10))
        assert [bench.take()[0][1:] for _ in range(3)] == [(0, 4), (4, 4), (8, 2)]

    def test_who_waited_longest_goes_first(self) -> None:
        bench = SchedulerBench(groups=2)
        a, b, c, d = bench.decoding(4, 4, 4, 4)
        bench.take()
        bench.answer(a, b)
        assert [session for session, _, _ in bench.take()] == [c, d]

    def test_decode_comes_before_prompts(self) -> None:
        bench = SchedulerBench(groups=1)
        decoding = bench.decoding(4, 4)
        prompt = new_session(5)
        bench.add(prompt)
        assert [session for session, _, _ in bench.take()] == [*decoding, prompt]


class TestRefusals:
    def test_a_prompt_larger_than_the_cache_never_fits(self) -> None:
        bench = SchedulerBench(blocks=2)
        with pytest.raises(Exhausted, match="the prompt has 32 tokens, but the KV cache holds 32") as caught:
            bench.add(new_session(32))
        assert caught.value.retry_after_seconds == 60.0

    def test_the_largest_that_fits_is_taken(self) -> None:
        bench = SchedulerBench(blocks=2)
        bench.add(new_session(31))
        assert sum(length for _, _, length in bench.take()) == 31

    def test_too_many_that_wait_are_refused(self) -> None:
        bench = SchedulerBench(max_waiting_sessions=2)
        bench.add(new_session(), new_session())
        with pytest.raises(Exhausted, match="2 sessions wait already"):
            bench.add(new_session())
        assert len(bench.scheduler.waiting) == 2

    def test_the_cache_limits_the_context(self) -> None:
        bench, session = SchedulerBench(blocks=2), new_session(20)
        bench.add(session)
        assert session.context_length == 32
        short = new_session(20, context_length=25)
        bench.add(short)
        assert short.context_length == 25


class TestEnds:
    def test_a_running_session_leaves_nothing(self) -> None:
        bench, session = SchedulerBench(), new_session()
        bench.add(session)
        bench.take()
        bench.scheduler.remove(session)
        bench.scheduler.remove(session)
        assert (bench.scheduler.running, bench.pool.free_blocks, bench.dropped) == ({}, 64, [])

    def test_a_waiting_session_leaves_nothing(self) -> None:
        bench, session, other = SchedulerBench(), new_session(), new_session()
        bench.add(session, other)
        bench.scheduler.remove(session)
        assert list(bench.scheduler.waiting) == [other]

    def test_one_that_was_never_here_does_no_harm(self) -> None:
        bench = SchedulerBench()
        bench.scheduler.remove(new_session())
        assert bench.take() == []
