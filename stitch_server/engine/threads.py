"""How many processor threads a pass gets: as many as made such passes fastest so far. Computes nothing itself.

More threads are not always faster: each product wakes and waits for all of them, which a small one isn't worth. A
token of SmolLM2 takes 22 ms on one of two cores and 26 ms on both, a prompt of 128 tokens 167 and 105 ms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Passes of one kind before each candidate is tried once more.
TRIAL_PASSES = 64
# How many times each candidate is tried at first, unless it takes so many times as long as another.
FIRST_TRIALS = 3
HOPELESS = 1.3
# Reading the weights takes as long as so many rows do; for passes of one kind that are of different sizes.
ROWS_WORTH_READING = 16
# The weight of the newest pass in a candidate's average.
NEWEST = 0.25


@dataclass(slots=True)
class _Kind:
    """Passes over about as many rows."""

    candidates: tuple[int, ...]
    passes: int = 0
    # What a row costs, in seconds, by the number of threads; a running mean. And how often each was tried.
    costs: dict[int, float] = field(default_factory=dict)
    trials: Counter[int] = field(default_factory=Counter)

    def choose(self) -> int:
        self.passes += 1
        again = (self.passes - 1) % TRIAL_PASSES
        if self.passes > TRIAL_PASSES and again < len(self.candidates):
            return self.candidates[again]
        # The least tried one first, so that all are tried under the same conditions.
        untried = [one for one in self.candidates if self.trials[one] < FIRST_TRIALS and not self._is_hopeless(one)]
        return min(untried, key=self.trials.__getitem__) if untried else self.fastest()

    def fastest(self) -> int:
        return min(self.costs, key=self.costs.__getitem__, default=self.candidates[0])

    def took(self, threads: int, cost: float) -> None:
        known = self.costs.get(threads, cost)
        self.costs[threads] = known + NEWEST * (cost - known)
        self.trials[threads] += 1

    def _is_hopeless(self, threads: int) -> bool:
        return self.costs.get(threads, 0.0) > HOPELESS * min(self.costs.values(), default=0.0)


class Threads:
    """Chooses, pass by pass: all threads, a quarter of them, or one."""

    def __init__(self, alone: int, pipelined: int) -> None:
        """`alone`: the most threads of a pass; `pipelined`: the same while a neighbour on this machine computes."""
        self._most = {False: alone, True: pipelined}
        self._kinds: dict[tuple[bool, int], _Kind] = {}

    def choose(self, rows: int, pipelined: bool) -> int:
        """For a pass over so many rows."""
        return self._kind(rows, pipelined).choose()

    def fastest(self, rows: int) -> int:
        """What passes over so many rows are fastest with while no neighbour computes, as far as is known."""
        return self._kind(rows, pipelined=False).fastest()

    def took(self, rows: int, pipelined: bool, threads: int, seconds: float) -> None:
        """What the pass that it was chosen for has taken."""
        self._kind(rows, pipelined).took(threads, seconds / (rows + ROWS_WORTH_READING))

    def _kind(self, rows: int, pipelined: bool) -> _Kind:
        key = pipelined, rows.bit_length()
        if key not in self._kinds:
            most = self._most[pipelined]
            candidates = sorted({most, max(1, most // 4), 1}, reverse=True)
            self._kinds[key] = _Kind(tuple(candidates))
        return self._kinds[key]
