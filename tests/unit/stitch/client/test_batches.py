"""A batch has an outcome for every request, whatever happens. Knows no connection."""

from __future__ import annotations

from stitch.client.answers import Answer
from stitch.client.batches import Batch
from stitch.errors import Expired, InvalidRequest, StitchError, Unavailable
from stitch.v1.inference_pb2 import (
    FINISH_REASON_STOP,
    Delta,
    Finished,
    GenerateBatchResponse,
    GenerateResponse,
    RequestError,
    RouteDecision,
    Started,
)


def answer_events(index: int, text: str) -> list[GenerateBatchResponse]:
    events = [
        GenerateResponse(started=Started(decision=RouteDecision(route="weak"))),
        GenerateResponse(delta=Delta(text=text, token_ids=[1])),
        GenerateResponse(finished=Finished(reason=FINISH_REASON_STOP)),
    ]
    return [GenerateBatchResponse(index=index, response=event) for event in events]


def texts(batch: Batch, failure: Exception | None = None) -> list[object]:
    return [outcome.text if isinstance(outcome, Answer) else type(outcome) for outcome in batch.outcomes(failure)]


def test_answers_come_in_the_order_of_asking() -> None:
    batch = Batch(["a", "b"])
    for event in answer_events(1, "B") + answer_events(0, "A"):
        batch.take(event)
    assert texts(batch) == ["A", "B"]


def test_interleaved_answers_are_told_apart() -> None:
    batch = Batch(["a", "b"])
    for pair in zip(answer_events(0, "A"), answer_events(1, "B"), strict=True):
        for event in pair:
            batch.take(event)
    assert texts(batch) == ["A", "B"]


def test_a_malformed_request_keeps_its_place_and_is_not_sent() -> None:
    batch = Batch(["a", {"prompt": 7}, 3, {"prompt": "d", "max_tokens": 2}])  # type: ignore[list-item]
    assert [request.prompt for request in batch.message.requests] == ["a", "d"]
    for event in answer_events(1, "D") + answer_events(0, "A"):
        batch.take(event)
    assert texts(batch) == ["A", InvalidRequest, InvalidRequest, "D"]


def test_a_request_that_fails_disturbs_no_other() -> None:
    batch = Batch(["a", "b"])
    batch.take(GenerateBatchResponse(index=0, error=RequestError(code=3, message="prompt is '', but …")))
    for event in answer_events(1, "B"):
        batch.take(event)
    failed, answered = batch.outcomes()
    assert isinstance(failed, InvalidRequest)
    assert failed.field == "prompt"
    assert isinstance(answered, Answer)


def test_what_ended_the_call_is_the_outcome_of_the_unanswered() -> None:
    batch = Batch(["a", "b"])
    for event in answer_events(0, "A"):
        batch.take(event)
    assert texts(batch, failure=Expired("too late")) == ["A", Expired]


def test_a_batch_that_ends_early_says_so() -> None:
    assert texts(Batch(["a"])) == [Unavailable]


def test_an_error_of_an_unknown_code_is_an_error() -> None:
    batch = Batch(["a"])
    batch.take(GenerateBatchResponse(index=0, error=RequestError(code=13, message="internal error")))
    (outcome,) = batch.outcomes()
    assert type(outcome) is StitchError
    assert str(outcome) == "internal error"


def test_an_empty_batch_has_no_outcome() -> None:
    assert Batch([]).outcomes() == []
