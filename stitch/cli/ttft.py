"""`stitch ttft`: measures the time to the first token against the prompt's length, for every route.

It prints the medians and a regression line per route, and writes samples and a plot where the flags name files. Every
time is the gateway's, from the request's arrival to the first text.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.progress import Progress

from stitch.cli.arguments import gateway_endpoint
from stitch.cli.output import seconds, table
from stitch.client import Answer, Client
from stitch.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Short and common words: nearly every one is a single token in any vocabulary.
_TEXT = """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
    which one you were all her she there would their we him been has when who will no more if out so up said
    what its about than into them can only other time new some could these two may first then do any like my now
    over such our man me even most made after also well did many must before back see through way where get much
    go good down work life
"""
WORDS = tuple(_TEXT.split())

# An answer without text has no time to first token; another prompt is sampled then.
MAX_TRIES = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `length` is the wanted number of prompt tokens, `prompt_tokens` the actual one."""

    route: str
    length: int
    prompt_tokens: int
    ttft_seconds: float
    stages: dict[str, float]


@dataclass(frozen=True, slots=True)
class Line:
    """The least-squares line through the medians: seconds = intercept + slope × prompt tokens."""

    slope_seconds: float
    intercept_seconds: float
    # The share of the variance that the line explains.
    r_squared: float

    def at(self, prompt_tokens: float) -> float:
        """Seconds to the first token of a prompt of that length."""
        return self.intercept_seconds + self.slope_seconds * prompt_tokens


def run(parsed: argparse.Namespace) -> int:
    """Measures every route, prints the tables, and writes the files that the flags name."""
    console = Console()
    with Client(*gateway_endpoint(parsed)) as client:
        found = client.describe()
        routes = [route.name for route in found.routes]
        context = min(found.bottom.context_length, found.top.context_length)
        samples = measure_with_progress(console, client, routes, fitting(parsed.lengths, context), parsed.repeat)
    show_times(console, samples, routes)
    if parsed.json:
        written = {"cluster": found.cluster, **report(samples, routes)}
        Path(parsed.json).parent.mkdir(parents=True, exist_ok=True)
        Path(parsed.json).write_text(json.dumps(written, indent=2) + "\n")
    if parsed.out:
        write_plot(console, samples, routes, found.cluster, Path(parsed.out))
    return 0


def measure_with_progress(
    console: Console, client: Client, routes: Sequence[str], lengths: Sequence[int], repeat: int
) -> list[Sample]:
    """All samples; shows progress on a terminal."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        samples = measure(client, routes, lengths, repeat)
        return list(progress.track(samples, total=len(routes) * len(lengths) * repeat, description="measuring"))


def show_times(console: Console, samples: Sequence[Sample], routes: Sequence[str]) -> None:
    """Prints the medians and the regression lines."""
    for drawn in (ttft_table(samples, routes), lines_table(samples, routes)):
        console.print()
        console.print(drawn)


def write_plot(console: Console, samples: Sequence[Sample], routes: Sequence[str], cluster: str, file: Path) -> None:
    """Writes the plot as PNG; prints a message instead where matplotlib is not installed."""
    try:
        plot(samples, routes, f"{cluster}: time to first token", file)
    except ImportError as error:
        console.print(f"no plot: {error}; install stitch-serving[cli]", highlight=False, markup=False)
        return
    console.print(f"plot: {file}", highlight=False, markup=False)


class Prompts:
    """Prompts of a wanted length that share no prefix, so that no cached KV shortens the prefill."""

    def __init__(self, client: Client, seed: int = 0) -> None:
        self._client = client
        self._random = random.Random(seed)

    def of(self, tokens: int) -> str:
        """Random words that the gateway counts as `tokens` tokens, or as close as whole words come."""
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
    """`repeat` samples for every route and length; routes alternate, so that drift affects all of them equally.

    One request per route warms up and yields no sample.
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
    raise Unavailable(f"{MAX_TRIES} answers of route {route} to {length} tokens have no text")


def fitting(lengths: Sequence[int], context_length: int) -> tuple[int, ...]:
    """The lengths that leave room for a token in the context; raises InvalidRequest where fewer than two do."""
    found = tuple(length for length in lengths if length < context_length)
    if len(found) < 2:
        raise InvalidRequest("lengths", tuple(lengths), f"two must be below the context of {context_length} tokens")
    return found


def medians(samples: Sequence[Sample], route: str) -> list[tuple[float, float]]:
    """By length, the median number of prompt tokens and the median time in seconds."""
    of_route = [sample for sample in samples if sample.route == route]
    points = []
    for length in sorted({sample.length for sample in of_route}):
        at_length = [sample for sample in of_route if sample.length == length]
        points.append(
            (_median(at_length, lambda one: one.prompt_tokens), _median(at_length, lambda one: one.ttft_seconds))
        )
    return points


def regression(points: Sequence[tuple[float, float]]) -> Line:
    """The least-squares line through points (prompt tokens, seconds) of at least two different lengths."""
    tokens, times = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(tokens, times)
    # Without variance the correlation is undefined, but the line fits every point.
    flat = min(times) == max(times)
    return Line(slope, intercept, 1.0 if flat else statistics.correlation(tokens, times) ** 2)


def report(samples: Sequence[Sample], routes: Sequence[str]) -> dict[str, Any]:
    """Every sample and regression line, as JSON values."""
    lines = {route: asdict(regression(medians(samples, route))) for route in routes}
    return {"lines": lines, "samples": [asdict(sample) for sample in samples]}


def _median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return float(statistics.median(value(sample) for sample in samples))


def _correction(counted: int, wanted: int, words: int) -> int:
    """The number of words to add, or to drop where negative; never 0."""
    per_word = counted / words
    change = round((wanted - counted) / per_word)
    return change or (1 if wanted > counted else -1)


def ttft_table(samples: Sequence[Sample], routes: Sequence[str]) -> Group:
    """The median time to the first token at every length, one column per route."""
    by_route = {route: medians(samples, route) for route in routes}
    lengths = sorted({sample.length for sample in samples})
    rows = [
        (f"{by_route[routes[0]][index][0]:g}", *(seconds(by_route[route][index][1]) for route in routes))
        for index in range(len(lengths))
    ]
    columns = ("prompt tokens", *routes)
    return table("time to first token (median)", columns, rows, right=columns)


def lines_table(samples: Sequence[Sample], routes: Sequence[str]) -> Group:
    """The regression line of every route."""
    columns = ("route", "ms per token", "intercept", "R²")
    rows = []
    for route in routes:
        line = regression(medians(samples, route))
        rows.append(
            (route, f"{line.slope_seconds * 1000:.3f}", seconds(line.intercept_seconds), f"{line.r_squared:.4f}")
        )
    return table("regression: time = intercept + slope × prompt tokens", columns, rows, right=columns[1:])


def line_text(line: Line) -> str:
    """A regression line's slope, intercept and fit."""
    sign = "−" if line.intercept_seconds < 0 else "+"
    formula = f"{line.slope_seconds * 1000:.2f} ms per token {sign} {seconds(abs(line.intercept_seconds))}"
    return f"{formula}, R² {line.r_squared:.3f}"


def plot(samples: Sequence[Sample], routes: Sequence[str], title: str, file: Path) -> None:
    """Writes a PNG: every sample, the medians, and each route's regression line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, route in enumerate(routes):
        _draw_route(axes, [sample for sample in samples if sample.route == route], f"C{index}")
    axes.set(xlabel="prompt tokens", ylabel="seconds to the first token", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_route(axes: Axes, samples: Sequence[Sample], color: str) -> None:
    route = samples[0].route
    points = medians(samples, route)
    line = regression(points)
    ends = (0.0, max(tokens for tokens, _ in points))
    axes.scatter([one.prompt_tokens for one in samples], [one.ttft_seconds for one in samples], 16, color, alpha=0.3)
    axes.scatter([tokens for tokens, _ in points], [time for _, time in points], 36, color)
    axes.plot(ends, [line.at(tokens) for tokens in ends], color=color, label=f"{route}: {line_text(line)}")
