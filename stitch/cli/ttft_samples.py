"""The time to the first token against the prompt's length, for every route. Doesn't know how it is drawn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stitch.client import Answer, Client
from stitch.errors import InvalidRequest, Unavailable

# Short and common, so that nearly every one is a token of its own in any vocabulary.
_TEXT = """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
    which one you were all her she there would their we him been has when who will no more if out so up said
    what its about than into them can only other time new some could these two may first then do any like my now
    over such our man me even most made after also well did many must before back see through way where get much
    go good down work life
"""
WORDS = tuple(_TEXT.split())

# A first token without text, such as an end token, has no time; another prompt is tried instead.
MAX_TRIES = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `length` is what was aimed at, `prompt_tokens` what the prompt has."""

    route: str
    length: int
    prompt_tokens: int
    ttft_seconds: float
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Least squares through the medians: seconds = intercept + slope × prompt tokens."""

    slope_seconds: float
    intercept_seconds: float
    # The share of the variance that the line explains.
    r_squared: float

    def at(self, prompt_tokens: float) -> float:
        """Seconds to the first token."""
        return self.intercept_seconds + self.slope_seconds * prompt_tokens


class Prompts:
    """Prompts of a wanted length that all begin differently, so that nothing cached shortens them."""

    def __init__(self, client: Client, seed: int = 0) -> None:
        self._client = client
        self._random = random.Random(seed)

    def of(self, tokens: int) -> str:
        """Random words that the gateway counts as `tokens` tokens, or as nearly as words allow."""
        words = self._random.choices(WORDS, k=2 * tokens)
        count, best, distance = tokens, "", tokens + 1
        for _ in range(8):
            prompt = " ".join(words[:count])
            counted = self._client.route(prompt).prompt_tokens
            if abs(counted - tokens) < distance:
                best, distance = prompt, abs(counted - tokens)
            if counted == tokens:
                break
            count = min(len(words), max(1, count + _correction(counted, tokens, count)))
        return best


def measure(
    client: Client, routes: Sequence[str], lengths: Sequence[int], repeat: int, seed: int = 0
) -> Iterator[Sample]:
    """`repeat` samples for every route and length; the routes alternate, so that drift meets all of them alike.

    The first pass over the routes warms up and is not reported.
    """
    prompts = Prompts(client, seed)
    for route in routes:
        _sample(client, prompts, route, min(lengths))
    for _ in range(repeat):
        for length in lengths:
            for route in routes:
                yield _sample(client, prompts, route, length)


def _sample(client: Client, prompts: Prompts, route: str, length: int) -> Sample:
    for _ in range(MAX_TRIES):
        answer: Answer = client.generate(prompts.of(length), route=route, max_tokens=1, ignore_eos=True)
        if answer.ttft_seconds is not None:
            return Sample(route, length, answer.prompt_tokens, answer.ttft_seconds, answer.stages)
    raise Unavailable(f"{MAX_TRIES} answers of route {route} to {length} tokens have no text, so no first one either")


def fitting(lengths: Sequence[int], context_length: int) -> tuple[int, ...]:
    """The lengths that leave room for a token; InvalidRequest where fewer than two do, too few for a line."""
    found = tuple(length for length in lengths if length < context_length)
    if len(found) < 2:
        raise InvalidRequest("lengths", tuple(lengths), f"two must be below the context of {context_length} tokens")
    return found


def medians(samples: Sequence[Sample], route: str) -> list[tuple[float, float]]:
    """For every length the median number of prompt tokens, and the median time in seconds."""
    mine = [sample for sample in samples if sample.route == route]
    points = []
    for length in sorted({sample.length for sample in mine}):
        at_length = [sample for sample in mine if sample.length == length]
        points.append(
            (_median(at_length, lambda one: one.prompt_tokens), _median(at_length, lambda one: one.ttft_seconds))
        )
    return points


def regression(points: Sequence[tuple[float, float]]) -> Line:
    """The line of least squares through points (prompt tokens, seconds) of at least two different lengths."""
    tokens, times = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(tokens, times)
    # Without any variance there is nothing to explain, and the line explains it.
    flat = min(times) == max(times)
    return Line(slope, intercept, 1.0 if flat else statistics.correlation(tokens, times) ** 2)


def report(samples: Sequence[Sample], routes: Sequence[str]) -> dict[str, Any]:
    """Everything measured and what follows from it, as JSON values."""
    lines = {route: asdict(regression(medians(samples, route))) for route in routes}
    return {"lines": lines, "samples": [asdict(sample) for sample in samples]}


def _median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return float(statistics.median(value(sample) for sample in samples))


def _correction(counted: int, wanted: int, words: int) -> int:
    """By how many words to change a prompt; never by none."""
    per_word = counted / words
    change = round((wanted - counted) / per_word)
    return change or (1 if wanted > counted else -1)
