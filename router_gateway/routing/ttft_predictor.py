"""Predicts a request's time to first token (TTFT) on a route from what the latest requests took.

First shards compute prompts in the order of their arrival, so a request waits for all earlier prompts, whatever their
routes. Its work is therefore the tokens of its own prompt and those of earlier prompts that are not computed yet; of a
prompt in progress, the pace of its route estimates how much is done. Per route,

    seconds = intercept + slope · tokens

is fitted by least squares of the relative error over a window of samples; neither term is negative. A prediction is a
bound: that line times the second largest factor in the window by which a sample exceeds it. If the order of samples is
random, 2 of WINDOW + 1 exceed it; a single outlier does not widen it. All factors are of one line: those of the lines
before would count a change of pace twice, in the line and once more in the factors of the samples that changed it.

A route whose bound refuses every request gets no samples by which the bound could fall again. So every
TRIAL_REFUSALS-th request in a row that the line would let in measures the route anew.
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
# A line needs this many samples, and a bound twice as many.
MIN_SAMPLES = 8
# Requests in a row that a bound refuses and its line does not, before one is let in.
TRIAL_REFUSALS = 16
# A sample of 0 s, by a coarse clock, has no relative error.
_MIN_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens: float
    seconds: float
    at: float


class TtftRegression:
    """The samples and the line of one route. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=WINDOW)
        # Of requests that the line would have let in, since the last sample.
        self._refusals = 0

    def observe(self, tokens: float, seconds: float, at: float) -> None:
        """Adds a sample: work of `tokens` took `seconds`, above 0, until the first text at `at`."""
        self._expire(at)
        self._refusals = 0
        self._samples.append(_Sample(tokens, seconds, at))

    def bound(self, tokens: float, at: float) -> float | None:
        """Seconds that nearly all requests with this much work stay below; None with too few samples."""
        self._expire(at)
        line = self.line(at)
        if line is None or len(self._samples) < 2 * MIN_SAMPLES:
            return None
        factors = sorted(sample.seconds / _evaluate(line, sample.tokens) for sample in self._samples)
        return _evaluate(line, tokens) * factors[-2]

    def bound_within(self, tokens: float, limit: float, at: float) -> float | None:
        """The bound of a request that is refused above `limit`; None also where it measures the route anew."""
        bound, line = self.bound(tokens, at), self.line(at)
        if bound is None or line is None or bound <= limit or _evaluate(line, tokens) > limit:
            return bound
        self._refusals += 1
        return bound if self._refusals % TRIAL_REFUSALS else None

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

    def predict_within(self, route: str, prompt_tokens: int, limit: float) -> float | None:
        """The same for a request that is refused where it takes longer; None also where it measures the route anew."""
        return self._regressions[route].bound_within(self._work_tokens(prompt_tokens), limit, self._clock())

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
