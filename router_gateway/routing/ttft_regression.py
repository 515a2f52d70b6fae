"""How long a route takes to its first text, from what it took lately. Knows no clock and no request.

seconds = intercept + slope · tokens: the prompt's tokens, and those of prompts that are to be computed before it.
Both are the least squares of the relative error over the samples of the window, and neither is negative. What is
promised is a bound: that line times the second largest factor in the window by which a sample was off the line, each
compared with the line as it was before the sample came. Two of WINDOW + 1 exceed that, if the order of samples says
nothing; a single accident spoils no bound.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Samples of a route that are remembered: few, so that a route whose pace changes is soon believed.
WINDOW = 64
# And for how long: trouble is forgotten even where its own predictions keep every request away.
MAX_AGE_SECONDS = 300.0
# So many make a line; so many more, compared with it, make a bound.
LEAST_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens: float
    seconds: float
    at: float
    # Measured seconds over those that the line predicted, or None where there was no line yet.
    factor: float | None


class TtftLine:
    """The samples of one route. Moments are seconds of one clock that never goes back."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=WINDOW)

    def observe(self, tokens: float, seconds: float, at: float) -> None:
        """A request with so much to compute took so long, more than 0, and its first text came now."""
        self._forget(at)
        line = self._line()
        factor = None if line is None else seconds / _at(line, tokens)
        self._samples.append(_Sample(tokens, seconds, at, factor))

    def bound(self, tokens: float, at: float) -> float | None:
        """Seconds that nearly all requests with so much to compute keep to; None where too little is known."""
        self._forget(at)
        line, factor = self._line(), self._factor()
        return None if line is None or factor is None else _at(line, tokens) * factor

    def slope(self, at: float) -> float | None:
        """Seconds for each token more; None where too little is known."""
        self._forget(at)
        line = self._line()
        return None if line is None else line[1]

    def _forget(self, at: float) -> None:
        while self._samples and self._samples[0].at < at - MAX_AGE_SECONDS:
            self._samples.popleft()

    def _line(self) -> tuple[float, float] | None:
        """Intercept and slope."""
        if len(self._samples) < LEAST_SAMPLES:
            return None
        # Each sample weighs 1 / seconds², so that errors count in relation to what was measured.
        sums = [0.0] * 5
        for sample in self._samples:
            a, b = 1 / sample.seconds, sample.tokens / sample.seconds
            for index, term in enumerate((a * a, a * b, b * b, a, b)):
                sums[index] += term
        return _least_squares(*sums)

    def _factor(self) -> float | None:
        factors = [sample.factor for sample in self._samples if sample.factor is not None]
        return sorted(factors)[-2] if len(factors) >= LEAST_SAMPLES else None


def _least_squares(aa: float, ab: float, bb: float, a: float, b: float) -> tuple[float, float]:
    """The minimum of Σ (x·aᵢ + y·bᵢ - 1)² over x, y ≥ 0, from the sums of products."""
    determinant = aa * bb - ab * ab
    # Prompts of one length fix no slope.
    if determinant > 1e-9 * aa * bb:
        x, y = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if x >= 0 and y >= 0:
            return x, y
        if x < 0:
            return 0.0, b / bb
    return a / aa, 0.0


def _at(line: tuple[float, float], tokens: float) -> float:
    intercept, slope = line
    return intercept + slope * tokens
