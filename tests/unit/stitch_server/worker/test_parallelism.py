"""What made passes fastest wins, kind by kind of pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from stitch_server.worker.parallelism import FIRST_PASSES, TRIAL_PASSES, Parallelism, ParallelismTuner, PassShape

Cost = Callable[[Parallelism], float]

TOKEN = PassShape(1)


def chosen(threads: ParallelismTuner, passes: int, cost: Cost, work: PassShape = TOKEN) -> list[Parallelism]:
    """What each of so many passes got, where `cost` is the seconds that it then takes."""
    choices = []
    for _ in range(passes):
        spread = threads.choose(work)
        threads.took(work, spread, cost(spread))
        choices.append(spread)
    return choices


def slower(spread: Parallelism) -> float:
    """With more threads."""
    return float(spread.threads)


def faster(spread: Parallelism) -> float:
    return 1 / spread.threads


@pytest.mark.parametrize(("cost", "best"), [(slower, 1), (faster, 8)])
def test_the_fastest_is_taken_once_all_were_tried(cost: Cost, best: int) -> None:
    choices = chosen(ParallelismTuner(8, 8), FIRST_PASSES, cost)
    assert set(choices[:9]) == {Parallelism(1, 8), Parallelism(1, 2), Parallelism(1, 1)}
    assert set(choices[9:]) == {Parallelism(1, best)}


def test_two_lanes_share_the_threads_of_what_can_be_cut() -> None:
    choices = chosen(
        ParallelismTuner(8, 8), TRIAL_PASSES, lambda spread: 1 / spread.lanes, PassShape(100, divisible=True)
    )
    assert set(choices) == {Parallelism(1, 8), Parallelism(1, 2), Parallelism(1, 1), Parallelism(2, 4)}
    assert choices[-1] == Parallelism(2, 4)


@pytest.mark.parametrize(("share", "trials"), [(1.2, 3), (1.4, 2)])
def test_what_is_much_slower_is_tried_less_often(share: float, trials: int) -> None:
    choices = Counter(
        chosen(ParallelismTuner(4, 4), FIRST_PASSES, lambda spread: share if spread.threads == 4 else 1.0)
    )
    assert choices[Parallelism(1, 4)] == trials


@pytest.mark.parametrize(("share", "trials"), [(1.2, 3), (1.4, 0)])
def test_what_stays_much_slower_waits_for_a_seldom_trial(share: float, trials: int) -> None:
    threads, cost = ParallelismTuner(2, 2), lambda spread: share if spread.threads == 1 else 1.0
    chosen(threads, FIRST_PASSES + 2, cost)
    assert Counter(chosen(threads, TRIAL_PASSES - FIRST_PASSES - 2, cost))[Parallelism(1, 1)] == trials
    assert Counter(chosen(threads, 2, cost))[Parallelism(1, 1)] == 1


@pytest.mark.parametrize(("rows", "trials"), [(20, 0), (100, 0), (200, 2)])
def test_what_is_hopeless_for_about_as_many_rows_is_not_tried_first(rows: int, trials: int) -> None:
    threads = ParallelismTuner(2, 2)
    chosen(threads, FIRST_PASSES, faster, PassShape(50))
    assert Counter(chosen(threads, FIRST_PASSES, faster, PassShape(rows)))[Parallelism(1, 1)] == trials
    assert chosen(threads, 100, slower, PassShape(rows))[-1] == Parallelism(1, 1)


@pytest.mark.parametrize("disturbed", [0, 1, 2, 9])
def test_one_pass_that_was_disturbed_decides_nothing(disturbed: int) -> None:
    threads, taken = ParallelismTuner(2, 2), Counter[Parallelism]()

    def cost(spread: Parallelism) -> float:
        taken[spread] += 1
        return 100 if spread == Parallelism(1, 1) and taken[spread] == disturbed + 1 else spread.threads

    choices = chosen(threads, FIRST_PASSES, cost)
    assert set(choices[6:]) == {Parallelism(1, 1)}


def test_first_trials_that_were_all_disturbed_are_soon_found_out() -> None:
    threads = ParallelismTuner(2, 2)
    chosen(threads, 6, slower)
    assert Counter(chosen(threads, 100, faster))[Parallelism(1, 2)] > 30


def test_passes_of_one_kind_are_compared_by_their_rows() -> None:
    threads = ParallelismTuner(4, 4)
    # Four threads are faster, but always have the larger passes.
    for _ in range(3):
        for rows, seconds in ((250, 0.2), (130, 0.15)):
            threads.took(PassShape(rows), threads.choose(PassShape(rows)), seconds)
    assert threads.choose(PassShape(200)) == Parallelism(1, 4)


def test_passes_of_one_kind_are_compared_by_what_they_attend_to() -> None:
    threads = ParallelismTuner(2, 2)
    # A prompt's later chunks take longer, and two lanes have them all.
    for part in range(100):
        work = PassShape(20, attended=part, divisible=True)
        spread = threads.choose(work)
        threads.took(work, spread, work.amount / spread.lanes)
    assert {threads.choose(PassShape(20, attended=1, divisible=True)) for _ in range(20)} == {Parallelism(2, 1)}


def test_what_has_become_faster_is_noticed() -> None:
    threads = ParallelismTuner(8, 8)
    chosen(threads, TRIAL_PASSES, faster)
    later = Counter(chosen(threads, 10 * TRIAL_PASSES, slower))
    assert later.most_common(1)[0][0] == Parallelism(1, 1)


def test_trials_are_rare() -> None:
    choices = Counter(chosen(ParallelismTuner(8, 8), 100 * TRIAL_PASSES, faster))
    assert choices[Parallelism(1, 8)] > 0.95 * 100 * TRIAL_PASSES


def test_kinds_learn_for_themselves() -> None:
    threads = ParallelismTuner(8, 4)
    chosen(threads, TRIAL_PASSES - 1, slower)
    chosen(threads, TRIAL_PASSES - 2, faster, PassShape(128))
    chosen(threads, TRIAL_PASSES - 1, faster, PassShape(1, pipelined=True))
    assert [threads.choose(PassShape(rows)).threads for rows in (1, 128, 200)] == [1, 8, 8]
    assert threads.choose(PassShape(1, pipelined=True)).threads == 4


def test_what_can_be_cut_learns_for_itself() -> None:
    threads = ParallelismTuner(2, 2)
    chosen(threads, TRIAL_PASSES - 1, lambda spread: 1 / spread.lanes, PassShape(128, divisible=True))
    chosen(threads, TRIAL_PASSES - 1, slower, PassShape(128))
    assert threads.choose(PassShape(128, divisible=True)) == Parallelism(2, 1)
    assert threads.choose(PassShape(128)) == Parallelism(1, 1)


@pytest.mark.parametrize("divisible", [False, True])
def test_one_thread_leaves_no_choice(divisible: bool) -> None:
    assert set(chosen(ParallelismTuner(1, 1), 200, slower, PassShape(64, divisible=divisible))) == {Parallelism(1, 1)}
