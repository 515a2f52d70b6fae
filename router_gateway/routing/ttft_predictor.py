"""Predicts a request's time to first token (TTFT) on a route from what the latest requests took.

First shards compute prompts in the order of their arrival, so a request waits for all earlier prompts, whatever their
routes. Its work is therefore the tokens of its own prompt and those of earlier prompts that are not computed yet; of a
prompt in progress, the pace of its route estimates how much is done. Per route,

    seconds = intercept + slope · tokens

is fitted by least squares of the relative error over a window of samples; neither term is negative. A prediction is a
bound: that line times the second largest factor in the window by which a sample exceeded the line, each compared with
the line before the sample was added. If the order of samples is random, 2 of WINDOW + 1 exceed it; a single outlier
does not widen it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

# Samples kept for each route: few, so that a change of pace soon dominates.
WINDOW = 64
# Samples expire, so that a slow phase is forgotten even where its own predictions keep every request away.
MAX_AGE_SECONDS = 300.0
# A line needs this many samples, and a bound this many more that were compared with a line.
MIN_SAMPLES = 8
# A sample of 0 s, by a coarse clock, has no relative error.
_MIN_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens: float
    seconds: float
    at: float
    # Measured seconds divided by predicted ones; None where there was no line yet.
    factor: float | None


class TtftRegression:
    """The samples and the line of one route. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=WINDOW)

    def observe(self, tokens: float, seconds: float, at: float) -> None:
        """Adds a sample: work of `tokens` took `seconds`, above 0, until the first text at `at`."""
        self._expire(at)
        line = self.line(at)
        factor = None if line is None else seconds / _evaluate(line, tokens)
        self._samples.append(_Sample(tokens, seconds, at, factor))

    def bound(self, tokens: float, at: float) -> float | None:
        """Seconds that nearly all requests with this much work stay below; None with too few samples."""
        self._expire(at)
        line, factor = self.line(at), self._factor()
        return None if line is None or factor is None else _evaluate(line, tokens) * factor

    def slope(self, at: float) -> float | None:
        """Seconds per token; None with too few samples."""
        line = self.line(at)
        return None if line is None else line[1]

    def line(self, at: float) -> tuple[float, float] | None:
        """Intercept and slope; None with too few samples. Callable from any thread."""
        samples = [sample for sample in tuple(self._samples) if sample.at >= at - MAX_AGE_SECONDS]
        if len(samples) < MIN_SAMPLES:
            return None
        # Each sample has the weight 1 / seconds², which makes its error relative.
        sums = [0.0] * 5
        for sample in samples:
            a, b = 1 / sample.seconds, sample.tokens / sample.seconds
            for index, term in enumerate((a * a, a * b, b * b, a, b)):
                sums[index] += term
        return _least_squares(*sums)

    def _expire(self, at: float) -> None:
        while self._samples and self._samples[0].at < at - MAX_AGE_SECONDS:
            self._samples.popleft()

    def _factor(self) -> float | None:
        factors = [sample.factor for sample in self._samples if sample.factor is not None]
        return sorted(factors)[-2] if len(factors) >= MIN_SAMPLES else None


def _least_squares(aa: float, ab: float, bb: float, a: float, b: float) -> tuple[float, float]:
    """The minimum of Σ (x·aᵢ + y·bᵢ - 1)² over x, y ≥ 0, from the sums of products."""
    determinant = aa * bb - ab * ab
    # Prompts of equal length determine no slope.
    if determinant > 1e-9 * aa * bb:
        x, y = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if x >= 0 and y >= 0:
            return x, y
        if x < 0:
            return 0.0, b / bb
    return a / aa, 0.0


def _evaluate(line: tuple[float, float], tokens: float) -> float:
    intercept, slope = line
    return intercept + slope * tokens


class TtftPredictor:
    """Predicts for arriving requests and learns from tracked ones.

    `first_shards` returns how many first shards share the prompts.
    """

    def __init__(self, routes: Iterable[str], first_shards: Callable[[], int], clock: Callable[[], float]) -> None:
        self._regressions = {route: TtftRegression() for route in routes}
        self._first_shards = first_shards
        self._clock = clock
        # Requests whose first token has not come, in the order of their arrival, by identity.
        self._pending: dict[int, TrackedRequest] = {}
        # Tokens of their prompts.
        self._pending_tokens = 0

    def predict_seconds(self, route: str, prompt_tokens: int) -> float | None:
        """From now to the first text, a bound that nearly all requests keep; None with too few samples."""
        return self._regressions[route].bound(self._work_tokens(prompt_tokens), self._clock())

    def alone_seconds(self, route: str, prompt_tokens: int) -> float | None:
        """The same as if no earlier prompt were pending."""
        return self._regressions[route].bound(prompt_tokens, self._clock())

    def fit(self, route: str) -> tuple[float, float]:
        """Intercept in seconds, and slope in seconds per token, of a route; NaN with too few samples.

        Callable from any thread.
        """
        return self._regressions[route].line(self._clock()) or (math.nan, math.nan)

    def track(self, prompt_tokens: int, route: str | None = None) -> TrackedRequest:
        """Adds a request to those whose prompt is pending; without a route, set `TrackedRequest.route` later."""
        request = TrackedRequest(self, prompt_tokens, self._work_tokens(prompt_tokens), self._clock(), route)
        self._pending[id(request)] = request
        self._pending_tokens += prompt_tokens
        self._mark_started()
        return request

    def remove(self, request: TrackedRequest) -> None:
        """The prompt is computed, or never will be: later requests don't wait for it."""
        if self._pending.pop(id(request), None) is not None:
            self._pending_tokens -= request.prompt_tokens
            self._mark_started()

    def observe(self, request: TrackedRequest) -> None:
        """Adds the sample of a request whose first text has come."""
        now = self._clock()
        if request.route is not None:
            seconds = max(now - request.arrival, _MIN_SECONDS)
            self._regressions[request.route].observe(request.work_tokens, seconds, now)

    def _mark_started(self) -> None:
        for request in self._in_progress():
            if request.started is None:
                request.started = self._clock()

    def _in_progress(self) -> Iterator[TrackedRequest]:
        """The oldest pending requests, one for each first shard."""
        return islice(self._pending.values(), max(self._first_shards(), 1))

    def _work_tokens(self, prompt_tokens: int) -> float:
        """Tokens to compute before the first token of such a prompt, its own included."""
        earlier = self._pending_tokens - sum(map(self._done_tokens, self._in_progress()))
        return prompt_tokens + earlier / max(self._first_shards(), 1)

    def _done_tokens(self, request: TrackedRequest) -> float:
        """How many of its prompt tokens are computed by now, estimated by the pace of its route."""
        now = self._clock()
        slope = None if request.route is None else self._regressions[request.route].slope(now)
        if request.started is None or not slope:
            return 0.0
        return min((now - request.started) / slope, request.prompt_tokens)


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """One request on its way to its first text. Leaving its block removes it from the pending ones."""

    predictor: TtftPredictor
    prompt_tokens: int
    # Tokens to compute before its first token.
    work_tokens: float
    arrival: float
    # None: not decided yet.
    route: str | None = None
    # When its prompt's computation began; None: earlier prompts are still pending.
    started: float | None = None
    _observed: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.prompt_computed()

    def prompt_computed(self) -> None:
        """A token came. Calls after the first have no effect."""
        self.predictor.remove(self)

    def text_sent(self) -> None:
        """Text goes to the client. Calls after the first have no effect."""
        if not self._observed:
            self._observed = True
            self.predictor.observe(self)
