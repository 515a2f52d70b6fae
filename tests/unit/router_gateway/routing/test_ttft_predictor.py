"""Tests of the TTFT predictor: its regression, its bound, pending prompts, and simulated loads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from router_gateway.routing.objectives import Forecast, Objectives, apply_objectives
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.ttft_predictor import (
    MAX_AGE_SECONDS,
    MIN_SAMPLES,
    TRIAL_REFUSALS,
    WINDOW,
    TrackedRequest,
    TtftPredictor,
    TtftRegression,
)
from stitch.errors import ObjectivesUnmet

ENOUGH = 2 * MIN_SAMPLES


def seconds_of(tokens: float) -> float:
    return 0.05 + 0.001 * tokens


def learned(count: int = ENOUGH, at: float = 0.0) -> TtftRegression:
    line = TtftRegression()
    for index in range(count):
        tokens = 10.0 + 97 * index % 500
        line.observe(tokens, seconds_of(tokens), at)
    return line


def test_bound_needs_enough_samples() -> None:
    assert TtftRegression().bound(100, 0.0) is None
    assert learned(ENOUGH - 1).bound(100, 0.0) is None
    assert learned(ENOUGH).bound(100, 0.0) is not None


@pytest.mark.parametrize("tokens", [1, 100, 5_000])
def test_bound_extrapolates_an_exact_line(tokens: float) -> None:
    assert learned().bound(tokens, 0.0) == pytest.approx(seconds_of(tokens))


def test_samples_expire() -> None:
    line = learned(at=10.0)
    assert line.bound(100, 10.0 + MAX_AGE_SECONDS) is not None
    assert line.bound(100, 10.1 + MAX_AGE_SECONDS) is None


def test_route_that_its_bound_starves_is_measured_anew() -> None:
    """Samples of a busy hour keep everyone away, but for a request now and then that the line would let in."""
    line = TtftRegression()
    for index in range(WINDOW):
        tokens = 10.0 + 97 * index % 500
        line.observe(tokens, seconds_of(tokens) * (10 if index % 8 == 0 else 1), 0.0)
    bound, typical = line.bound(100, 0.0) or 0, seconds_of(100)
    assert bound > 5 * typical
    asked = [line.bound_within(100, 4 * typical, 0.0) for _ in range(2 * TRIAL_REFUSALS)]
    assert [index for index, one in enumerate(asked, 1) if one is None] == [TRIAL_REFUSALS, 2 * TRIAL_REFUSALS]
    # What the line would refuse is never let in, and what the bound lets in is no trial.
    assert all(line.bound_within(100, typical / 2, 0.0) for _ in range(2 * TRIAL_REFUSALS))
    assert all(line.bound_within(100, 2 * bound, 0.0) for _ in range(2 * TRIAL_REFUSALS))
    # A sample begins the row anew.
    for _ in range(2 * TRIAL_REFUSALS):
        assert line.bound_within(100, 4 * typical, 0.0) is not None
        line.observe(100, typical, 0.0)


def test_bound_follows_a_route_that_became_slower() -> None:
    line = learned(WINDOW)
    for index in range(2 * WINDOW):
        tokens = 10.0 + 97 * index % 500
        line.observe(tokens, 4 * seconds_of(tokens), 1.0)
        # With old and new samples mixed, the bound covers the new speed from the third new sample on.
        assert index < 2 or (line.bound(100, 1.0) or 0) >= 0.99 * 4 * seconds_of(100)
    assert line.bound(100, 1.0) == pytest.approx(4 * seconds_of(100))


def test_change_of_pace_counts_once() -> None:
    draw, line = random.Random(0), learned()
    for _ in range(WINDOW):
        tokens = draw.uniform(10, 500)
        line.observe(tokens, 4 * seconds_of(tokens) * draw.uniform(0.8, 1.2), 1.0)
    assert 1 <= (line.bound(100, 1.0) or 0) / (4 * seconds_of(100)) <= 1.3


def test_bound_ignores_a_single_outlier() -> None:
    line = learned(WINDOW)
    line.observe(100, 100 * seconds_of(100), 0.0)
    assert line.bound(100, 0.0) == pytest.approx(seconds_of(100), rel=0.05)


def test_prompts_of_equal_length_give_a_constant() -> None:
    line = TtftRegression()
    for _ in range(ENOUGH):
        line.observe(64, 0.2, 0.0)
    assert line.bound(64, 0.0) == pytest.approx(0.2)
    assert line.bound(640, 0.0) == pytest.approx(0.2)


def test_bound_never_decreases_with_the_prompt() -> None:
    line = TtftRegression()
    for index in range(ENOUGH):
        line.observe(10.0 * (index + 1), 1.0 / (index + 1), 0.0)
    assert (line.bound(500, 0.0) or 0) >= (line.bound(10, 0.0) or 0) > 0


def test_bound_is_never_negative() -> None:
    line = TtftRegression()
    for index in range(ENOUGH):
        line.observe(100.0 * (index + 1), 0.01 * (index + 1) ** 2, 0.0)
    assert (line.bound(1, 0.0) or 0) > 0


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_nearly_all_samples_stay_below_the_bound(spread: float) -> None:
    draw = random.Random(1)
    line, kept, asked = TtftRegression(), 0, 0
    for index in range(1_000):
        tokens = draw.uniform(10, 1_000)
        seconds = seconds_of(tokens) * draw.lognormvariate(0, spread)
        bound = line.bound(tokens, float(index) / 10)
        if bound is not None:
            asked += 1
            kept += seconds <= bound
        line.observe(tokens, seconds, float(index) / 10)
    assert asked == 1_000 - ENOUGH
    assert 0.95 <= kept / asked < 1


def test_bound_is_no_wider_than_the_samples() -> None:
    draw = random.Random(1)
    line = TtftRegression()
    for _ in range(WINDOW):
        tokens = draw.uniform(10, 1_000)
        line.observe(tokens, seconds_of(tokens) * draw.uniform(0.9, 1.1), 0.0)
    assert seconds_of(500) <= (line.bound(500, 0.0) or 0) <= 1.3 * seconds_of(500)


TOKEN_SECONDS = 0.01


class Gateway:
    """Computes prompts one after another; the clock moves only here."""

    def __init__(self, first_shards: int = 1) -> None:
        self.now = 0.0
        self.first_shards = first_shards
        self.predictor = TtftPredictor(["weak", "strong"], lambda: self.first_shards, lambda: self.now)

    def answer(self, route: str, tokens: int) -> None:
        run = self.predictor.track(tokens, route)
        self.now += tokens * TOKEN_SECONDS
        run.prompt_computed()
        run.text_sent()

    def learn(self, route: str) -> None:
        for index in range(2 * MIN_SAMPLES):
            self.answer(route, 10 + 7 * index)


@pytest.fixture
def gateway() -> Gateway:
    gateway = Gateway()
    gateway.learn("weak")
    return gateway


def test_prediction_needs_samples_of_its_route(gateway: Gateway) -> None:
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.0)
    assert gateway.predictor.predict_seconds("strong", 200) is None


def test_prediction_includes_pending_prompts_of_any_route(gateway: Gateway) -> None:
    run = gateway.predictor.track(300, "strong")
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(5.0)
    run.prompt_computed()
    run.prompt_computed()
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.0)


def test_first_shards_share_pending_prompts(gateway: Gateway) -> None:
    gateway.first_shards = 2
    gateway.predictor.track(300, "strong")
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(3.5)
    # Also without first shards there is a prediction.
    gateway.first_shards = 0
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(5.0)


def test_sample_includes_prompts_that_were_pending(gateway: Gateway) -> None:
    first, second = gateway.predictor.track(100, "weak"), gateway.predictor.track(50, "weak")
    for run, tokens in ((first, 100), (second, 50)):
        gateway.now += tokens * TOKEN_SECONDS
        run.prompt_computed()
        run.text_sent()
    # The second took 1.5 s for 50 tokens after 100, which is on the line.
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.0)


def test_first_text_is_observed_once(gateway: Gateway) -> None:
    run = gateway.predictor.track(10, "weak")
    gateway.now += 0.1
    run.text_sent()
    gateway.now += 100.0
    run.text_sent()
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.0)


def test_prediction_subtracts_prefill_already_done(gateway: Gateway) -> None:
    first, second = gateway.predictor.track(300, "weak"), gateway.predictor.track(100, "weak")
    gateway.now += 1.0
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(5.0)
    # The first prompt takes longer than predicted, and the second one has not started.
    gateway.now += 3.0
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(3.0)
    first.prompt_computed()
    gateway.now += 0.5
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.5)
    second.prompt_computed()
    assert gateway.predictor.predict_seconds("weak", 200) == pytest.approx(2.0)


ROUTE_TOKEN_SECONDS = {"weak": 0.001, "strong": 0.0014}
OVERHEAD_SECONDS = 0.05
NOISE = 0.1
LEARNING, ASKED = 100, 3_000


@dataclass
class Shards:
    """Shards that compute one prompt after another; `slowdown` is a factor on all durations at a time."""

    draw: random.Random
    slowdown: Callable[[float], float]
    now: float = 0.0
    free_at: float = 0.0
    # Times of first texts, and their requests.
    due: list[tuple[float, TrackedRequest]] = field(default_factory=list)

    def compute(self, run: TrackedRequest, route: str, tokens: int) -> float:
        """The time of the first text."""
        seconds = tokens * ROUTE_TOKEN_SECONDS[route] * self.slowdown(self.now) * self.draw.lognormvariate(0, NOISE)
        self.free_at = max(self.now, self.free_at) + seconds
        self.due.append((self.free_at + OVERHEAD_SECONDS, run))
        return self.due[-1][0]

    def pass_time(self, until: float) -> None:
        """Delivers every first text that is due by then."""
        while self.due and self.due[0][0] <= until:
            self.now, run = self.due.pop(0)
            run.prompt_computed()
            run.text_sent()
        self.now = until


@dataclass
class Kept:
    taken: int = 0
    met: int = 0
    refused: int = 0
    # Refused although the cheapest route, without noise, would have met the objective.
    wrongly: int = 0


def simulate(slowdown: Callable[[float], float], mean_gap: float, seed: int = 1) -> Kept:
    """Simulates requests at random times, with objectives from below to far above the TTFT of an idle cluster."""
    draw, kept = random.Random(seed), Kept()
    shards = Shards(draw, slowdown)
    predictor = TtftPredictor(ROUTE_TOKEN_SECONDS, lambda: 1, lambda: shards.now)
    for index in range(LEARNING + ASKED):
        shards.pass_time(shards.now + draw.expovariate(1 / mean_gap))
        tokens, preferred = int(16 * 2 ** draw.uniform(0, 6)), draw.choice(list(ROUTE_TOKEN_SECONDS))
        if index < LEARNING:
            shards.compute(predictor.track(tokens, preferred), preferred, tokens)
            continue
        idle = OVERHEAD_SECONDS + tokens * ROUTE_TOKEN_SECONDS["weak"]
        limit = idle * 0.7 * 10 ** draw.random()
        forecasts = [
            Forecast(route, predictor.predict_seconds(route, tokens), None, None) for route in ROUTE_TOKEN_SECONDS
        ]
        try:
            decision = apply_objectives(
                Objectives(max_ttft_seconds=limit), RouteDecision(preferred, 0.5, "", "gain"), forecasts
            )
        except ObjectivesUnmet:
            kept.refused += 1
            waited = max(shards.free_at - shards.now, 0)
            kept.wrongly += (
                waited + tokens * ROUTE_TOKEN_SECONDS["weak"] * slowdown(shards.now) + OVERHEAD_SECONDS <= limit
            )
            continue
        began = shards.now
        done = shards.compute(predictor.track(tokens, decision.route), decision.route, tokens)
        kept.taken += 1
        kept.met += done - began <= limit
    return kept


@pytest.mark.parametrize("mean_gap", [5.0, 0.6, 0.3, 0.15])
def test_predictions_hold_at_any_load(mean_gap: float) -> None:
    kept = simulate(lambda now: 1.0, mean_gap)
    assert kept.met / kept.taken >= 0.95
    assert kept.wrongly / (kept.wrongly + kept.taken) <= 0.3


@pytest.mark.parametrize("seconds", [60.0, 300.0])
def test_predictions_hold_when_shards_change_speed(seconds: float) -> None:
    kept = simulate(lambda now: 1.0 if int(now / seconds) % 2 else 2.0, 0.6)
    assert kept.met / kept.taken >= 0.95


def test_fit_is_the_line_of_a_route_and_unknown_with_too_few_samples() -> None:
    now = 0.0
    predictor = TtftPredictor(["weak", "strong"], lambda: 1, lambda: now)
    for tokens in range(10, 10 * (MIN_SAMPLES + 1), 10):
        with predictor.track(tokens, "weak") as request:
            now += seconds_of(tokens)
            request.text_sent()
    assert predictor.fit("weak") == pytest.approx((0.05, 0.001))
    assert all(map(math.isnan, predictor.fit("strong")))
    now += MAX_AGE_SECONDS
    assert all(map(math.isnan, predictor.fit("weak")))
