"""How a pass is spread over processor threads: as made such passes fastest so far. Computes nothing itself.

More threads are not always faster: a helper has to be woken for each pass, or, where a library multiplies, for each
product, and a neighbour on this machine may need the cores. Compiled kernels are shared task by task. A pass of many
rows may be cut into lanes, which meet only at its end, but each lane reads all weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from statistics import median
from typing import NamedTuple

# Passes of one kind before each candidate is tried once more; then twice as many, and so on up to the most, which is
# seldom enough that nobody's p95 shows it. First trials may all have met with a neighbour's beginning. What was much
# slower at the first of these times waits for the most.
FIRST_PASSES = 16
TRIAL_PASSES = 256
# How many times each candidate is tried at first; two are enough where the better one took so many times as long as
# another's best. One is never enough: whatever comes first fills caches.
FIRST_TRIALS = 3
HOPELESS = 1.3
# Reading the weights takes as long as so many rows do.
ROWS_WORTH_READING = 16
# So many of its passes speak for a candidate.
NEWEST = 5


class Parallelism(NamedTuple):
    """Into how many lanes a pass is cut, and how many threads each of them has."""

    lanes: int
    threads: int


class PassShape(NamedTuple):
    """What a pass has to do."""

    rows: int
    # How many rows take as long as its attention does beside that.
    attended: float = 0.0
    # Whether a neighbour on this machine computes at the same time, and whether the pass can be cut into lanes.
    pipelined: bool = False
    divisible: bool = False

    @property
    def kind(self) -> tuple[bool, bool, int]:
        """The same for what is compared with each other: passes of about as many rows."""
        return self.pipelined, self.divisible, self.rows.bit_length()

    @property
    def amount(self) -> float:
        """What its time is divided by, so that it can be compared."""
        return self.rows + self.attended + ROWS_WORTH_READING


class _Trials:
    """Passes of one kind."""

    def __init__(self, candidates: Sequence[Parallelism]) -> None:
        self._passes, self._trial = 0, FIRST_PASSES
        # Seconds by amount, of the newest passes.
        self._costs = {one: deque[float](maxlen=NEWEST) for one in candidates}

    def choose(self, doubtful: Collection[Parallelism]) -> Parallelism:
        """For the next pass; what is `doubtful` is not among the first that are tried."""
        self._passes += 1
        again = self._passes - self._trial - 1
        if again >= len(self._costs):
            self._trial += min(self._trial, TRIAL_PASSES)
        elif again >= 0 and self._is_worth_it(candidate := list(self._costs)[again]):
            return candidate
        # The least tried one first, so that all are tried under the same conditions.
        first = [one for one in self._costs if one not in doubtful] or list(self._costs)
        untried = [one for one in first if len(self._costs[one]) < FIRST_TRIALS and not self._is_hopeless(one)]
        if untried:
            return min(untried, key=lambda one: len(self._costs[one]))
        # Medians, since a pass may be disturbed by anything.
        return min((one for one in self._costs if self._costs[one]), key=lambda one: median(self._costs[one]))

    def took(self, spread: Parallelism, cost: float) -> None:
        self._costs[spread].append(cost)

    @property
    def hopeless(self) -> list[Parallelism]:
        """What took much longer than others each time."""
        return [one for one in self._costs if self._is_hopeless(one)]

    def _is_worth_it(self, spread: Parallelism) -> bool:
        """Whether to try it once more: what seems hopeless once soon, and then as seldom as can be."""
        return not FIRST_PASSES < self._trial < TRIAL_PASSES or not self._is_hopeless(spread)

    def _is_hopeless(self, spread: Parallelism) -> bool:
        tried = [min(costs) for costs in self._costs.values() if costs]
        return len(self._costs[spread]) > 1 and min(self._costs[spread]) > HOPELESS * min(tried)


class ParallelismTuner:
    """Chooses, pass by pass: all threads, also in two lanes where that can be, a quarter of them, or one."""

    def __init__(self, alone: int, pipelined: int) -> None:
        """`alone`: the most threads of a pass; `pipelined`: the same while a neighbour on this machine computes."""
        self._most = {False: alone, True: pipelined}
        self._kinds: dict[tuple[bool, bool, int], _Trials] = {}

    def choose(self, work: PassShape) -> Parallelism:
        """For a pass that is about to begin."""
        pipelined, divisible, size = work.kind
        # Of about half and of about twice as many rows.
        neighbours = [self._kinds.get((pipelined, divisible, one)) for one in (size - 1, size + 1)]
        doubtful = {spread for trials in neighbours if trials is not None for spread in trials.hopeless}
        return self._trials(work).choose(doubtful)

    def took(self, work: PassShape, spread: Parallelism, seconds: float) -> None:
        """What a pass has taken."""
        self._trials(work).took(spread, seconds / work.amount)

    def _trials(self, work: PassShape) -> _Trials:
        if work.kind not in self._kinds:
            self._kinds[work.kind] = _Trials(_candidates(self._most[work.pipelined], work.divisible))
        return self._kinds[work.kind]


def _candidates(most: int, divisible: bool) -> list[Parallelism]:
    lanes = {Parallelism(2, most // 2)} if divisible and most > 1 else set()
    return sorted({*lanes, Parallelism(1, most), Parallelism(1, max(1, most // 4)), Parallelism(1, 1)}, reverse=True)
