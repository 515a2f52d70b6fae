"""What the gateway promises of first texts, against shards that compute one prompt after the other, in made-up time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from router_gateway.routing.objectives import Forecast, Objectives, settled
from router_gateway.routing.router import RouteDecision
from router_gateway.routing.ttft_predictor import Run, TtftPredictor
from stitch.errors import ObjectivesUnmet

SECONDS_A_TOKEN = {"weak": 0.001, "strong": 0.0014}
OVERHEAD_SECONDS = 0.05
NOISE = 0.1
LEARNING, ASKED = 100, 3_000


@dataclass
class Shards:
    """Prompts wait in line; `pace` is a factor on all times at a moment."""

    draw: random.Random
    pace: Callable[[float], float]
    now: float = 0.0
    free_at: float = 0.0
    # Moments at which a first text leaves, and whose.
    due: list[tuple[float, Run]] = field(default_factory=list)

    def compute(self, run: Run, route: str, tokens: int) -> float:
        """The moment of the first text."""
        seconds = tokens * SECONDS_A_TOKEN[route] * self.pace(self.now) * self.draw.lognormvariate(0, NOISE)
        self.free_at = max(self.now, self.free_at) + seconds
        self.due.append((self.free_at + OVERHEAD_SECONDS, run))
        return self.due[-1][0]

    def pass_time(self, until: float) -> None:
        """Everything that is due by then happens."""
        while self.due and self.due[0][0] <= until:
            self.now, run = self.due.pop(0)
            run.token()
            run.text()
        self.now = until


@dataclass
class Kept:
    taken: int = 0
    met: int = 0
    refused: int = 0
    # Refused, though the cheapest route would have been in time, had nothing strayed.
    wrongly: int = 0


def promised(pace: Callable[[float], float], mean_gap: float, seed: int = 1) -> Kept:
    """Requests at random moments, with objectives from below the time of an idle cluster to far above it."""
    draw, kept = random.Random(seed), Kept()
    shards = Shards(draw, pace)
    known = TtftPredictor(SECONDS_A_TOKEN, lambda: 1, lambda: shards.now)
    for index in range(LEARNING + ASKED):
        shards.pass_time(shards.now + draw.expovariate(1 / mean_gap))
        tokens, preferred = int(16 * 2 ** draw.uniform(0, 6)), draw.choice(list(SECONDS_A_TOKEN))
        if index < LEARNING:
            shards.compute(known.begin(tokens, preferred), preferred, tokens)
            continue
        idle = OVERHEAD_SECONDS + tokens * SECONDS_A_TOKEN["weak"]
        limit = idle * 0.7 * 10 ** draw.random()
        forecasts = [Forecast(route, known.seconds(route, tokens), None, None) for route in SECONDS_A_TOKEN]
        try:
            judged = settled(Objectives(max_ttft_seconds=limit), RouteDecision(preferred, 0.5, "", "gain"), forecasts)
        except ObjectivesUnmet:
            kept.refused += 1
            waited = max(shards.free_at - shards.now, 0)
            kept.wrongly += waited + tokens * SECONDS_A_TOKEN["weak"] * pace(shards.now) + OVERHEAD_SECONDS <= limit
            continue
        began = shards.now
        done = shards.compute(known.begin(tokens, judged.route), judged.route, tokens)
        kept.taken += 1
        kept.met += done - began <= limit
    return kept


@pytest.mark.parametrize("mean_gap", [5.0, 0.6, 0.3, 0.15])
def test_first_texts_come_in_time_whatever_the_load(mean_gap: float) -> None:
    kept = promised(lambda now: 1.0, mean_gap)
    assert kept.met / kept.taken >= 0.95
    assert kept.wrongly / (kept.wrongly + kept.taken) <= 0.3


@pytest.mark.parametrize("seconds", [60.0, 300.0])
def test_first_texts_come_in_time_where_the_pace_changes(seconds: float) -> None:
    kept = promised(lambda now: 1.0 if int(now / seconds) % 2 else 2.0, 0.6)
    assert kept.met / kept.taken >= 0.95
