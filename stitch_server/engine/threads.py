"""How many processor threads a pass gets: as many as made such passes fastest so far. Computes nothing itself.

More threads are not always faster: each product wakes and waits for all of them, which a small one isn't worth. A
token of SmolLM2 takes 22 ms on one of two cores and 26 ms on both, a prompt of 128 tokens 167 and 105 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Passes of one kind before each candidate is tried once more.
TRIAL_PASSES = 64
# How many times each candidate is tried at first.
FIRST_TRIALS = 3
# The weight of the newest pass in a candidate's average.
NEWEST = 0.25


@dataclass(slots=True)
class _Kind:
    """Passes over about as many rows."""

    candidates: tuple[int, ...]
    passes: int = 0
    # Seconds of a pass by the number of threads; a running mean.
    seconds: dict[int, float] = field(default_factory=dict)

    def choose(self) -> int:
        self.passes += 1
        trial = (self.passes - 1) % TRIAL_PASSES
        if trial < len(self.candidates) * (FIRST_TRIALS if self.passes <= TRIAL_PASSES else 1):
            return self.candidates[trial % len(self.candidates)]
        return min(self.seconds, key=self.seconds.__getitem__, default=self.candidates[0])

    def took(self, threads: int, seconds: float) -> None:
        known = self.seconds.get(threads, seconds)
        self.seconds[threads] = known + NEWEST * (seconds - known)


class Threads:
    """Chooses, pass by pass: all threads, a quarter of them, or one."""

    def __init__(self, alone: int, pipelined: int) -> None:
        """`alone`: the most threads of a pass; `pipelined`: the same while a neighbour on this machine computes."""
        self._most = {False: alone, True: pipelined}
        self._kinds: dict[tuple[bool, int], _Kind] = {}

    def choose(self, rows: int, pipelined: bool) -> int:
        """For a pass over so many rows."""
        return self._kind(rows, pipelined).choose()

    def took(self, rows: int, pipelined: bool, threads: int, seconds: float) -> None:
        """What the pass that it was chosen for has taken."""
        self._kind(rows, pipelined).took(threads, seconds)

    def _kind(self, rows: int, pipelined: bool) -> _Kind:
        key = pipelined, rows.bit_length()
        if key not in self._kinds:
            most = self._most[pipelined]
            candidates = sorted({most, max(1, most // 4), 1}, reverse=True)
            self._kinds[key] = _Kind(tuple(candidates))
        return self._kinds[key]
