"""Predicts what a request will take: tokens, work, and seconds on shards beside a number of other requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router_gateway.admission.service_times import AnswerLengths, DecodeTimes, mean, nearly_all

# The weight of one request in a running mean.
MEAN_WEIGHT = 0.1
# How long an answer takes as long as none has ended.
UNKNOWN_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Size:
    """What a request is expected to take, whatever runs beside it."""

    route: str
    prompt_tokens: int
    # In the mean, and in nearly all cases.
    answer_tokens: float
    most_answer_tokens: int
    # Parameters that its route reads for a token, relative to the costliest route.
    cost: float
    # Answers that share the prompt, each of that length.
    answers: int = 1

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.answers * self.answer_tokens

    @property
    def work(self) -> float:
        return self.cost * self.tokens


class Forecast:
    """Learns from requests that have ended.

    `ttft_seconds` predicts the time to the first token for a route and a number of prompt tokens, and `costs` has the
    parameters that routes read for a token, relative to the costliest one.
    """

    def __init__(
        self, ttft_seconds: Callable[[str, int], float | None], costs: Callable[[], Mapping[str, float]]
    ) -> None:
        self._ttft_seconds = ttft_seconds
        self._costs = costs
        self.lengths = AnswerLengths()
        self.decode = DecodeTimes()
        # Of requests that have ended, in the mean; None: none has.
        self.mean_ttft_seconds: float | None = None
        self.mean_seconds: float | None = None
        self.mean_tokens: float | None = None

    def size(
        self, tenant: str, route: str, prompt_tokens: int, max_tokens: int, is_exact: bool, answers: int = 1
    ) -> Size:
        """`is_exact`: the answer has `max_tokens` whatever the model says. An empty route is not decided yet."""
        lengths = [] if is_exact else self.lengths.tokens_within(tenant, route, max_tokens)
        cost = self._costs().get(route, 1.0) if route else 1.0
        expected, most = mean(lengths, max_tokens), nearly_all(lengths, max_tokens)
        return Size(route, prompt_tokens, expected, most, cost, answers)

    def seconds(self, size: Size, running: float) -> float:
        """In the mean, beside `running` requests of a first shard, itself included."""
        return (self.mean_ttft_seconds or 0.0) + self._decode_seconds(size.answer_tokens, running)

    def bound_seconds(self, size: Size, running: float) -> float:
        """What nearly all requests of that size stay below."""
        ttft = self._ttft_seconds(size.route, size.prompt_tokens) if size.route else None
        return (ttft or 0.0) + self._decode_seconds(size.most_answer_tokens, running) * self.decode.factor

    def running_within(self, size: Size, seconds: float) -> float:
        """How many may run on its first shard so that nearly all requests of that size end in time."""
        ttft = self._ttft_seconds(size.route, size.prompt_tokens) or 0.0
        tokens = max(size.most_answer_tokens - 1, 1)
        within = self.decode.running_within((seconds - ttft) / tokens / self.decode.factor)
        return math.inf if within is None else within

    def observe(self, ttft_seconds: float, seconds: float, tokens: int) -> None:
        """A request has been answered: from its start to its first token, to its end, and all its tokens."""
        self.mean_ttft_seconds = _moved(self.mean_ttft_seconds, ttft_seconds)
        self.mean_seconds = _moved(self.mean_seconds, seconds)
        self.mean_tokens = _moved(self.mean_tokens, tokens)

    def _decode_seconds(self, tokens: float, running: float) -> float:
        seconds = self.decode.seconds(running)
        return UNKNOWN_SECONDS if seconds is None else max(tokens - 1, 0) * seconds


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + MEAN_WEIGHT * (value - average)
