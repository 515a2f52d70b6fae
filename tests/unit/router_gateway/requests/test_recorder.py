"""Tests of the recorder: exactly one outcome for a request, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client import generate_latest

from router_gateway.metrics import OUTCOMES, Metrics
from router_gateway.requests.recorder import Recorder
from router_gateway.routing.router import REASON_KINDS, RouteDecision
from stitch.errors import Exhausted, Expired, InvalidRequest, ObjectivesUnmet, StitchError, Unavailable
from stitch.v1 import inference_pb2
from stitch.v1.inference_pb2 import Stage

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
DECISION = RouteDecision("strong", 0.7, "why", "content")


class RecordersOnClock:
    """Recorders on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Metrics(["weak", "strong"], REASON_KINDS)
        self.aborting = False

    def record(self, deadline: float | None = None) -> Recorder:
        return Recorder(100.0, deadline, self.metrics, lambda: self.now, lambda: self.aborting)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def outcomes(self, route: str = "none") -> dict[str, float]:
        name = "stitch_request_duration_seconds_count"
        counts = {outcome: self.value(name, route=route, outcome=outcome) for outcome in OUTCOMES}
        return {outcome: count for outcome, count in counts.items() if count}


@pytest.fixture
def recorders() -> RecordersOnClock:
    return RecordersOnClock()


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
def test_error_is_counted_as_its_outcome(recorders: RecordersOnClock, error: BaseException, outcome: str) -> None:
    with pytest.raises(type(error)), recorders.record():
        raise error
    assert recorders.outcomes() == {outcome: 1}


@pytest.mark.parametrize(("reason", "outcome"), [(STOP, "stop"), (LENGTH, "length")])
def test_finish_is_counted_by_route_with_its_duration(recorders: RecordersOnClock, reason: int, outcome: str) -> None:
    with recorders.record() as recorder:
        recorder.record_prompt(100, None)
        recorder.record_decision(DECISION)
        recorders.now = 103.0
        recorder.record_finish(reason)
    assert recorders.outcomes("strong") == {outcome: 1}
    assert recorders.value("stitch_request_duration_seconds_sum", route="strong", outcome=outcome) == 3.0


def test_client_that_leaves_after_the_finish_is_not_cancelled(recorders: RecordersOnClock) -> None:
    recorder = recorders.record()
    recorder.record_finish(STOP)
    with pytest.raises(GeneratorExit), recorder:
        raise GeneratorExit
    assert recorders.outcomes() == {"stop": 1}


@pytest.mark.parametrize(
    ("aborting", "now", "cause"),
    [
        (False, 101.0, "client"),
        (True, 101.0, "shutdown"),
        (True, 111.0, "deadline"),
        # The client's clock ended the call slightly before the deadline.
        (False, 109.9, "deadline"),
        (False, 109.8, "client"),
    ],
)
def test_cancellation_is_counted_by_cause(recorders: RecordersOnClock, aborting: bool, now: float, cause: str) -> None:
    recorders.aborting = aborting

    def leave(deadline: float) -> None:
        with recorders.record(deadline):
            recorders.now = now
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave(110.0)
    assert recorders.value("stitch_cancelled_total", cause=cause) == 1


def test_only_the_first_text_sets_the_ttft(recorders: RecordersOnClock) -> None:
    with recorders.record() as recorder:
        recorder.record_prompt(100, None)
        recorder.record_decision(DECISION)
        assert not recorder.ttft_seconds
        recorders.now = 100.5
        recorder.record_text()
        recorders.now = 109.0
        recorder.record_text()
    assert recorder.ttft_seconds == {0: 0.5}
    assert recorders.value("stitch_time_to_first_token_seconds_sum", route="strong") == 0.5
    by_prompt = "stitch_time_to_first_token_by_prompt_seconds_count"
    assert recorders.value(by_prompt, route="strong", prompt_bucket="le128") == 1
    assert recorders.value(by_prompt, route="strong", prompt_bucket="le64") == 0
    assert recorders.value("stitch_ttft_prompt_tokens_total", route="strong", prompt_bucket="le128") == 100


def test_tokens_of_one_step_share_its_latency(recorders: RecordersOnClock) -> None:
    with recorders.record() as recorder:
        recorder.record_prompt(100, None)
        recorder.record_decision(DECISION)
        recorder.record_tokens(1, [])
        recorders.now = 100.6
        recorder.record_tokens(3, [])
        recorder.record_tokens(0, [])
    assert recorders.value("stitch_inter_token_latency_seconds_count", route="strong") == 3
    assert recorders.value("stitch_inter_token_latency_seconds_sum", route="strong") == pytest.approx(0.6)
    assert recorders.value("stitch_generated_tokens_total", route="strong") == 4


def test_unknown_stage_is_kept_and_gets_no_label(recorders: RecordersOnClock) -> None:
    recorders.now = 100.25
    with recorders.record() as recorder:
        recorder.record_placement()
        recorder.record_tokens(1, [Stage(name="queue", seconds=0.5), Stage(name="x" * 99, seconds=1.0)])
    assert recorder.stages[:2] == [Stage(name="route", seconds=0.25), Stage(name="queue", seconds=0.5)]
    assert recorders.value("stitch_ttft_stage_seconds_sum", stage="queue") == 0.5
    assert b"xxx" not in generate_latest(recorders.metrics.registry)


@pytest.mark.parametrize(
    ("act", "waiting", "running"), [(lambda recorder: None, 1, 0), (lambda recorder: recorder.record_placement(), 0, 1)]
)
def test_request_is_counted_as_waiting_or_running(
    recorders: RecordersOnClock, act: Callable[[Recorder], None], waiting: int, running: int
) -> None:
    def places() -> tuple[float | None, float | None]:
        return recorders.value("stitch_requests_waiting"), recorders.value("stitch_requests_running")

    with recorders.record() as recorder:
        act(recorder)
        assert places() == (waiting, running)
    assert places() == (0, 0)
