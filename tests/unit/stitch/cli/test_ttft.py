"""Times to the first token: prompts of a wanted length, alternation of routes, medians, regression lines."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from stitch.cli.ttft import (
    MAX_TRIES,
    Line,
    Prompts,
    Sample,
    fitting,
    line_text,
    measure,
    medians,
    regression,
    report,
)
from stitch.client import Client
from stitch.errors import InvalidRequest, Unavailable
from tests.support.fake_gateway import ROUTES, FakeGateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.address) as connected:
        yield connected


def sample(route: str, length: int, ttft_seconds: float, prompt_tokens: int | None = None) -> Sample:
    return Sample(route, length, prompt_tokens or length, ttft_seconds, {})


def sloped(route: str, tokens: int) -> float:
    """2 ms per token on the strong route, 1 ms on the weak one, both from 100 ms on."""
    return 0.1 + tokens * (0.002 if route == "strong" else 0.001)


@pytest.mark.parametrize("tokens", [1, 2, 33, 500])
def test_prompt_has_wanted_length(client: Client, tokens: int) -> None:
    assert client.route(Prompts(client).of(tokens)).prompt_tokens == tokens


class SpellingClient:
    """Counts two tokens per letter and one per word, so that most lengths can't be hit exactly."""

    def __init__(self) -> None:
        self.requests = 0

    def route(self, prompt: str) -> Sample:
        self.requests += 1
        return sample("weak", 0, 0.0, prompt_tokens=2 * len(prompt.replace(" ", "")) + len(prompt.split()))


@pytest.mark.parametrize("tokens", [40, 500])
def test_prompt_is_close_to_wanted_length_with_long_words(tokens: int) -> None:
    client = SpellingClient()
    prompt = Prompts(client).of(tokens)  # type: ignore[arg-type]
    assert abs(client.route(prompt).prompt_tokens - tokens) <= 7
    assert client.requests <= 9


def test_prompts_share_no_prefix(client: Client) -> None:
    prompts = Prompts(client)
    assert len({tuple(prompts.of(32).split()[:6]) for _ in range(20)}) == 20


def test_prompts_repeat_with_same_seed(client: Client) -> None:
    assert Prompts(client, seed=3).of(16) == Prompts(client, seed=3).of(16)


def test_measure_alternates_routes_after_warm_up(client: Client, gateway: FakeGateway) -> None:
    samples = list(measure(client, ROUTES, (4, 8), repeat=2))
    order = [(one.route, one.length) for one in samples]
    assert order == [("weak", 4), ("strong", 4), ("weak", 8), ("strong", 8)] * 2
    generated = [request for request in gateway.requests if hasattr(request, "sampling")]
    assert len(generated) == len(samples) + 2
    assert all(request.sampling.max_tokens == 1 and request.sampling.ignore_eos for request in generated)


def test_sample_has_ttft_of_gateway(client: Client, gateway: FakeGateway) -> None:
    gateway.ttft_seconds = sloped
    samples = list(measure(client, ["strong"], (4, 8), repeat=1))
    assert [(one.prompt_tokens, one.ttft_seconds) for one in samples] == [
        (4, sloped("strong", 4)),
        (8, sloped("strong", 8)),
    ]
    assert "bottom_prefill" in samples[0].stages


def test_measure_repeats_answer_without_text(client: Client, gateway: FakeGateway) -> None:
    times = iter([0.1, None, None, 0.2, 0.3])
    gateway.ttft_seconds = lambda route, tokens: next(times)
    assert [one.ttft_seconds for one in measure(client, ["weak"], (4, 8), repeat=1)] == [0.2, 0.3]


def test_measure_names_route_without_text(client: Client, gateway: FakeGateway) -> None:
    gateway.ttft_seconds = lambda route, tokens: None
    with pytest.raises(Unavailable, match=f"^{MAX_TRIES} answers of route weak to 4 tokens have no text"):
        list(measure(client, ["weak"], (4, 8), repeat=1))


def test_medians_are_per_length_of_one_route() -> None:
    samples = [
        *(sample("weak", 32, seconds) for seconds in (0.1, 9.0, 0.2)),
        *(sample("weak", 64, seconds, tokens) for seconds, tokens in ((0.4, 63), (0.6, 66))),
        sample("strong", 32, 5.0),
    ]
    assert medians(samples, "weak") == [(32.0, 0.2), (64.5, 0.5)]


def test_regression_of_collinear_points_is_exact() -> None:
    line = regression([(tokens, sloped("strong", tokens)) for tokens in (32, 64, 512)])
    assert line.slope_seconds == pytest.approx(0.002)
    assert line.intercept_seconds == pytest.approx(0.1)
    assert line.r_squared == pytest.approx(1.0)
    assert line.at(1000) == pytest.approx(2.1)


def test_regression_minimizes_squares() -> None:
    # By hand: means 2 and 3; slope (1·2 + 0·1 + 1·1) / 2; residuals 0.5, -1, 0.5 against 2 in all.
    line = regression([(1.0, 2.0), (2.0, 2.0), (3.0, 5.0)])
    assert line == Line(pytest.approx(1.5), pytest.approx(0.0), pytest.approx(0.75))


def test_regression_of_equal_times_has_r_squared_one() -> None:
    assert regression([(1.0, 2.0), (2.0, 2.0)]) == Line(0.0, 2.0, 1.0)


def test_fitting_drops_lengths_beyond_context() -> None:
    assert fitting((32, 64, 128), context_length=128) == (32, 64)


def test_fitting_refuses_context_without_two_lengths() -> None:
    with pytest.raises(InvalidRequest, match=r"^lengths is \(32, 64\), but two must be below .* 64 tokens$"):
        fitting((32, 64), context_length=64)


def test_report_has_every_sample_and_line() -> None:
    samples = [sample(route, length, sloped(route, length)) for route in ROUTES for length in (32, 64)]
    written = json.loads(json.dumps(report(samples, ROUTES)))
    assert written["lines"]["strong"]["slope_seconds"] == pytest.approx(0.002)
    assert written["samples"][0] == {
        "route": "weak",
        "length": 32,
        "prompt_tokens": 32,
        "ttft_seconds": sloped("weak", 32),
        "stages": {},
    }


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (Line(0.0025, 0.09, 0.998), "2.50 ms per token + 90 ms, R² 0.998"),
        (Line(0.0025, -0.09, 1.0), "2.50 ms per token − 90 ms, R² 1.000"),
    ],
)
def test_line_text_is_formula_with_fit(line: Line, text: str) -> None:
    assert line_text(line) == text
