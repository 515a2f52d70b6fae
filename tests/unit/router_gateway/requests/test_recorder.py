"""However a request ends, it leaves exactly one outcome behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import generate_latest

from router_gateway.metrics import OUTCOMES, Metrics
from router_gateway.requests.preparation import Prepared
from router_gateway.requests.recorder import Recorder
from router_gateway.requests.types import FinishReason, Request, Stage
from router_gateway.routing.router import REASON_KINDS, RouteDecision
from router_gateway.routing.ttft_predictor import TtftPredictor
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.errors import Exhausted, Expired, InvalidRequest, ObjectivesUnmet, StitchError, Unavailable
from stitch.sampling import Sampling
from tests.support.byte_tokenizer import tokenizer_files

VOCABULARY = Vocabulary.from_files(tokenizer_files())
JUDGEMENT = RouteDecision("strong", 0.7, "why", "content")


def prepared() -> Prepared:
    return Prepared(Request("id", "x", Sampling()), (1,) * 100, JUDGEMENT, Sampling(), VOCABULARY)


class Bench:
    """An observation on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Metrics(["weak", "strong"], REASON_KINDS)
        self.pace = TtftPredictor(["weak", "strong"], lambda: 1, lambda: self.now)
        self.stopping = False

    def observe(self, deadline: float | None = None) -> Recorder:
        return Recorder(100.0, deadline, self.pace, self.metrics, lambda: self.now, lambda: self.stopping)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def outcomes(self, route: str = "none") -> dict[str, float]:
        name = "stitch_request_duration_seconds_count"
        counts = {outcome: self.value(name, route=route, outcome=outcome) for outcome in OUTCOMES}
        return {outcome: count for outcome, count in counts.items() if count}


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("a", 1, "b"), "invalid"),
        (Exhausted("full"), "exhausted"),
        (Unavailable("gone"), "unavailable"),
        (Expired("late"), "expired"),
        (ObjectivesUnmet("too slow"), "unmet"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (StitchError("broken"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_an_error_is_an_outcome(bench: Bench, error: BaseException, outcome: str) -> None:
    with pytest.raises(type(error)), bench.observe():
        raise error
    assert bench.outcomes() == {outcome: 1}


@pytest.mark.parametrize(("reason", "outcome"), [(FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")])
def test_an_end_is_an_outcome_of_its_route_with_its_time(bench: Bench, reason: FinishReason, outcome: str) -> None:
    with bench.observe() as seen:
        seen.prepared(prepared())
        seen.judged(JUDGEMENT)
        bench.now = 103.0
        seen.finished(reason)
    assert bench.outcomes("strong") == {outcome: 1}
    assert bench.value("stitch_request_duration_seconds_sum", route="strong", outcome=outcome) == 3.0


def test_a_client_that_leaves_with_the_last_piece_has_its_answer(bench: Bench) -> None:
    seen = bench.observe()
    seen.finished(FinishReason.STOP)
    with pytest.raises(GeneratorExit), seen:
        raise GeneratorExit
    assert bench.outcomes() == {"stop": 1}


@pytest.mark.parametrize(
    ("stopping", "now", "cause"),
    [
        (False, 101.0, "client"),
        (True, 101.0, "shutdown"),
        (True, 111.0, "deadline"),
        # The client's clock was a little earlier.
        (False, 109.9, "deadline"),
        (False, 109.8, "client"),
    ],
)
def test_an_early_end_has_a_cause(bench: Bench, stopping: bool, now: float, cause: str) -> None:
    bench.stopping = stopping

    def leave(deadline: float) -> None:
        with bench.observe(deadline):
            bench.now = now
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave(110.0)
    assert bench.value("stitch_cancelled_total", cause=cause) == 1


def test_the_first_text_alone_sets_the_time(bench: Bench) -> None:
    with bench.observe() as seen:
        seen.prepared(prepared())
        seen.judged(JUDGEMENT)
        assert seen.ttft_seconds is None
        bench.now = 100.5
        seen.text()
        bench.now = 109.0
        seen.text()
    assert seen.ttft_seconds == 0.5
    assert bench.value("stitch_time_to_first_token_seconds_sum", route="strong") == 0.5
    by_prompt = "stitch_time_to_first_token_by_prompt_seconds_count"
    assert bench.value(by_prompt, route="strong", prompt_bucket="le128") == 1
    assert bench.value(by_prompt, route="strong", prompt_bucket="le64") == 0


def test_tokens_that_come_at_once_share_the_time(bench: Bench) -> None:
    with bench.observe() as seen:
        seen.prepared(prepared())
        seen.judged(JUDGEMENT)
        seen.tokens(1, [])
        bench.now = 100.6
        seen.tokens(3, [])
        seen.tokens(0, [])
    assert bench.value("stitch_inter_token_latency_seconds_count", route="strong") == 3
    assert bench.value("stitch_inter_token_latency_seconds_sum", route="strong") == pytest.approx(0.6)
    assert bench.value("stitch_generated_tokens_total", route="strong") == 4


def test_stages_are_kept_and_a_strange_one_makes_no_label(bench: Bench) -> None:
    bench.now = 100.25
    with bench.observe() as seen:
        seen.handed_over()
        seen.tokens(1, [Stage("queue", 0.5), Stage("x" * 99, 1.0)])
    assert seen.stages[:2] == (Stage("route", 0.25), Stage("queue", 0.5))
    assert bench.value("stitch_ttft_stage_seconds_sum", stage="queue") == 0.5
    assert b"xxx" not in generate_latest(bench.metrics.registry)


@pytest.mark.parametrize(
    ("act", "waiting", "running"), [(lambda seen: None, 1, 0), (lambda seen: seen.handed_over(), 0, 1)]
)
def test_a_request_is_in_one_place_at_a_time(
    bench: Bench, act: Callable[[Recorder], None], waiting: int, running: int
) -> None:
    def places() -> tuple[float | None, float | None]:
        return bench.value("stitch_requests_waiting"), bench.value("stitch_requests_running")

    with bench.observe() as seen:
        act(seen)
        assert places() == (waiting, running)
    assert places() == (0, 0)
