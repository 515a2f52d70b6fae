"""How long requests run on shards, learned from those that have ended: tokens of answers, and seconds per token.

All running requests share the passes of the shards, so the time of one token grows with their number. It is learned by
bands of that number, without assuming a formula.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

WINDOW = 64
MIN_SAMPLES = 8
# Bounds of the bands of numbers of running requests: powers of this.
BAND_RATIO = 1.5
# The weight of one answer in the mean of its band; the first ones count alike.
SAMPLE_WEIGHT = 0.1
# Bands without an answer are forgotten: the speed of shards changes with prompts and with what else a machine does.
MAX_AGE_SECONDS = 60.0
MOST_RUNNING = 4096


class AnswerLengths:
    """The tokens of the latest answers, by tenant and route."""

    def __init__(self) -> None:
        # Tokens, and whether the answer ended before its limit.
        self._answers: dict[tuple[str, str], deque[tuple[int, bool]]] = {}

    def observe(self, tenant: str, route: str, tokens: int, ended_itself: bool) -> None:
        for key in ((tenant, route), (tenant, "")):
            self._answers.setdefault(key, deque(maxlen=WINDOW)).append((tokens, ended_itself))

    def tokens_within(self, tenant: str, route: str, max_tokens: int) -> list[int]:
        """Lengths that an answer with that limit would have had, ascending; empty with too few samples.

        An answer that was cut at a lower limit says nothing of what would have followed. An empty route means any.
        """
        answers = self._answers.get((tenant, route), ())
        found = sorted(min(tokens, max_tokens) for tokens, ended in answers if ended or tokens >= max_tokens)
        return found if len(found) >= MIN_SAMPLES else []


def mean(values: list[int], otherwise: int) -> float:
    return sum(values) / len(values) if values else otherwise


def nearly_all(values: list[int], otherwise: int) -> int:
    """What nine of ten don't exceed; the values are ascending."""
    return values[math.ceil(0.9 * len(values)) - 1] if values else otherwise


@dataclass(slots=True)
class Band:
    """Means of the answers beside about equally many others."""

    answers: int = 0
    running: float = 0.0
    # For one token of an answer.
    seconds: float = 0.0
    # When the last answer came.
    at: float = 0.0

    def add(self, running: float, seconds: float, at: float) -> None:
        self.answers, self.at = self.answers + 1, at
        weight = max(SAMPLE_WEIGHT, 1 / self.answers)
        self.running += weight * (running - self.running)
        self.seconds += weight * (seconds - self.seconds)


class DecodeTimes:
    """Seconds per token over the number of requests that run on one first shard."""

    def __init__(self) -> None:
        self._bands: dict[int, Band] = {}
        # In the order of their numbers of running requests.
        self._ordered: list[Band] = []
        # Measured seconds divided by predicted ones.
        self._factors: deque[float] = deque(maxlen=WINDOW)

    def observe(self, running: float, seconds: float, at: float) -> None:
        """Adds what an answer has shown by that time: the mean number of running requests, itself included, and its
        seconds per token.
        """
        running = max(running, 1.0)
        if (predicted := self.seconds(running)) is not None:
            self._factors.append(seconds / predicted)
        self._bands.setdefault(round(math.log(running, BAND_RATIO)), Band()).add(running, seconds, at)
        self._bands = {index: band for index, band in self._bands.items() if band.at >= at - MAX_AGE_SECONDS}
        self._ordered = sorted(self._bands.values(), key=lambda band: band.running)

    def seconds(self, running: float) -> float | None:
        """Per token, in the mean; None before the first answer.

        Beside fewer requests than were ever observed a token takes no longer; beside more, as much longer as the root
        of their number, which is between a pass that takes as long for more requests and one that takes in proportion.
        """
        bands = self._ordered
        if not bands:
            return None
        if running <= bands[0].running:
            return bands[0].seconds
        for low, high in pairwise(bands):
            if running <= high.running:
                part = (running - low.running) / (high.running - low.running)
                return low.seconds + part * (high.seconds - low.seconds)
        return bands[-1].seconds * math.sqrt(running / bands[-1].running)

    @property
    def factor(self) -> float:
        """What nearly all answers' seconds stay below, as a multiple of the mean: two of 65 exceed it."""
        return max(1.0, sorted(self._factors)[-2]) if len(self._factors) >= MIN_SAMPLES else 1.0

    def running_within(self, seconds: float) -> float | None:
        """How many may run so that a token takes at most that long in the mean, at most MOST_RUNNING.

        None before the first answer.
        """
        if not self._ordered:
            return None
        low, high = 0.0, float(MOST_RUNNING)
        while high - low > 0.5:
            middle = (low + high) / 2
            if (self.seconds(middle) or 0.0) <= seconds:
                low = middle
            else:
                high = middle
        return high
