"""The fastest number of threads wins, kind by kind of pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from stitch_server.engine.threads import TRIAL_PASSES, Threads

Cost = Callable[[int], float]


def chosen(threads: Threads, passes: int, cost: Cost, rows: int = 1, pipelined: bool = False) -> list[int]:
    """What each of so many passes got, where `cost` is the seconds that threads take."""
    choices = []
    for _ in range(passes):
        count = threads.choose(rows, pipelined)
        threads.took(rows, pipelined, count, cost(count))
        choices.append(count)
    return choices


def slower(threads: int) -> float:
    return float(threads)


def faster(threads: int) -> float:
    return 1 / threads


@pytest.mark.parametrize(("cost", "best"), [(slower, 1), (faster, 8)])
def test_the_fastest_is_taken_once_all_were_tried(cost: Cost, best: int) -> None:
    choices = chosen(Threads(8, 8), TRIAL_PASSES, cost)
    assert set(choices[:9]) == {8, 2, 1}
    assert set(choices[9:]) == {best}


@pytest.mark.parametrize(("share", "trials"), [(1.2, 3), (1.4, 1)])
def test_what_is_much_slower_is_tried_once(share: float, trials: int) -> None:
    choices = Counter(chosen(Threads(4, 4), TRIAL_PASSES, lambda threads: share if threads == 4 else 1.0))
    assert choices[4] == trials


def test_passes_of_one_kind_are_compared_by_their_rows() -> None:
    threads = Threads(4, 4)
    # Four threads are faster, but always have the larger passes.
    for _ in range(3):
        for rows, seconds in ((250, 0.2), (130, 0.15)):
            threads.took(rows, False, threads.choose(rows, False), seconds)
    assert threads.choose(200, False) == threads.fastest(200) == 4


def test_the_fastest_is_that_without_a_neighbour() -> None:
    threads = Threads(8, 8)
    assert threads.fastest(100) == 8
    chosen(threads, TRIAL_PASSES, faster, rows=100, pipelined=True)
    chosen(threads, TRIAL_PASSES, slower, rows=100)
    assert threads.fastest(100) == 1


def test_what_has_become_faster_is_noticed() -> None:
    threads = Threads(8, 8)
    chosen(threads, TRIAL_PASSES, faster)
    later = Counter(chosen(threads, 10 * TRIAL_PASSES, slower))
    assert later.most_common(1)[0][0] == 1


def test_trials_are_rare() -> None:
    choices = Counter(chosen(Threads(8, 8), 100 * TRIAL_PASSES, faster))
    assert choices[8] > 0.95 * 100 * TRIAL_PASSES


def test_kinds_learn_for_themselves() -> None:
    threads = Threads(8, 4)
    chosen(threads, TRIAL_PASSES - 1, slower, rows=1)
    chosen(threads, TRIAL_PASSES - 2, faster, rows=128)
    chosen(threads, TRIAL_PASSES - 1, faster, rows=1, pipelined=True)
    assert [threads.choose(1, False), threads.choose(128, False), threads.choose(200, False)] == [1, 8, 8]
    assert threads.choose(1, True) == 4


def test_one_thread_leaves_no_choice() -> None:
    assert set(chosen(Threads(1, 1), 200, slower)) == {1}
