"""Predictions for requests that come, from those that came, and from those that stand before them."""

from __future__ import annotations

import pytest

from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.routing.ttft_regression import LEAST_SAMPLES

SECONDS_A_TOKEN = 0.01


class Gateway:
    """Computes prompts one after the other, on a clock that only this moves."""

    def __init__(self, lanes: int = 1) -> None:
        self.now = 0.0
        self.lanes = lanes
        self.pace = TtftPredictor(["weak", "strong"], lambda: self.lanes, lambda: self.now)

    def answer(self, route: str, tokens: int) -> None:
        run = self.pace.begin(tokens, route)
        self.now += tokens * SECONDS_A_TOKEN
        run.token()
        run.text()

    def learn(self, route: str) -> None:
        for index in range(2 * LEAST_SAMPLES):
            self.answer(route, 10 + 7 * index)


@pytest.fixture
def gateway() -> Gateway:
    gateway = Gateway()
    gateway.learn("weak")
    return gateway


def test_each_route_is_learned_by_itself(gateway: Gateway) -> None:
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.0)
    assert gateway.pace.seconds("strong", 200) is None


def test_a_request_waits_for_the_prompts_before_it_on_any_route(gateway: Gateway) -> None:
    run = gateway.pace.begin(300, "strong")
    assert gateway.pace.seconds("weak", 200) == pytest.approx(5.0)
    run.token()
    run.token()
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.0)


def test_first_shards_share_the_work(gateway: Gateway) -> None:
    gateway.lanes = 2
    gateway.pace.begin(300, "strong")
    assert gateway.pace.seconds("weak", 200) == pytest.approx(3.5)
    # Nobody serves; whoever asks gets a prediction all the same.
    gateway.lanes = 0
    assert gateway.pace.seconds("weak", 200) == pytest.approx(5.0)


def test_what_stood_before_a_request_is_part_of_what_is_learned(gateway: Gateway) -> None:
    first, second = gateway.pace.begin(100, "weak"), gateway.pace.begin(50, "weak")
    for run, tokens in ((first, 100), (second, 50)):
        gateway.now += tokens * SECONDS_A_TOKEN
        run.token()
        run.text()
    # The second took 1.5 s for 50 tokens behind 100, which is on the line.
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.0)


def test_a_first_text_counts_once(gateway: Gateway) -> None:
    run = gateway.pace.begin(10, "weak")
    gateway.now += 0.1
    run.text()
    gateway.now += 100.0
    run.text()
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.0)


def test_of_a_prompt_that_is_being_computed_only_the_rest_stands_before_others(gateway: Gateway) -> None:
    first, second = gateway.pace.begin(300, "weak"), gateway.pace.begin(100, "weak")
    gateway.now += 1.0
    assert gateway.pace.seconds("weak", 200) == pytest.approx(5.0)
    # It takes longer than its route's pace, but the second one has not begun.
    gateway.now += 3.0
    assert gateway.pace.seconds("weak", 200) == pytest.approx(3.0)
    first.token()
    gateway.now += 0.5
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.5)
    second.token()
    assert gateway.pace.seconds("weak", 200) == pytest.approx(2.0)
