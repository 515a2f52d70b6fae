"""A batch has one outcome per request, whatever fails."""

from __future__ import annotations

import itertools

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
    if failure is not None:
        batch.fail(failure)
    return [outcome.text if isinstance(outcome, Answer) else type(outcome) for outcome in batch.outcomes()]


def test_outcomes_are_in_request_order() -> None:
    batch = Batch(["a", "b"])
    for event in answer_events(1, "B") + answer_events(0, "A"):
        batch.add(event)
    assert texts(batch) == ["A", "B"]


def test_batch_separates_interleaved_answers() -> None:
    batch = Batch(["a", "b"])
    for pair in zip(answer_events(0, "A"), answer_events(1, "B"), strict=True):
        for event in pair:
            batch.add(event)
    assert texts(batch) == ["A", "B"]


def test_malformed_request_is_not_sent_and_keeps_its_index() -> None:
    batch = Batch(["a", {"prompt": 7}, 3, {"prompt": "d", "max_tokens": 2}])  # type: ignore[list-item]
    assert [request.prompt for request in batch.messages[0].requests] == ["a", "d"]
    for event in answer_events(1, "D") + answer_events(0, "A"):
        batch.add(event)
    assert texts(batch) == ["A", InvalidRequest, InvalidRequest, "D"]


def test_failed_request_leaves_others_unchanged() -> None:
    batch = Batch(["a", "b"])
    batch.add(GenerateBatchResponse(index=0, error=RequestError(code=3, message="prompt is '', but …")))
    for event in answer_events(1, "B"):
        batch.add(event)
    failed, answered = batch.outcomes()
    assert isinstance(failed, InvalidRequest)
    assert failed.field == "prompt"
    assert isinstance(answered, Answer)


def test_failed_call_is_outcome_of_unanswered_requests() -> None:
    batch = Batch(["a", "b"])
    for event in answer_events(0, "A"):
        batch.add(event)
    assert texts(batch, failure=Expired("too late")) == ["A", Expired]


def test_unanswered_request_is_unavailable() -> None:
    assert texts(Batch(["a"])) == [Unavailable]


def test_error_with_unmapped_code_is_stitch_error() -> None:
    batch = Batch(["a"])
    batch.add(GenerateBatchResponse(index=0, error=RequestError(code=13, message="internal error")))
    (outcome,) = batch.outcomes()
    assert type(outcome) is StitchError
    assert str(outcome) == "internal error"


def test_empty_batch_has_no_calls_and_no_outcomes() -> None:
    assert (Batch([]).messages, Batch([]).outcomes()) == ([], [])


def test_requests_over_size_of_message_travel_in_several_calls() -> None:
    requests = ["a" * (10 + index) for index in range(20)]
    batch = Batch(requests, max_bytes=100)
    assert [one.prompt for message in batch.messages for one in message.requests] == requests
    assert len(batch.messages) > 1
    assert all(message.ByteSize() <= 100 for message in batch.messages)
    assert all(
        first.ByteSize() + second.requests[0].ByteSize() > 80 for first, second in itertools.pairwise(batch.messages)
    )
    for call, message in enumerate(batch.messages):
        for index, request in enumerate(message.requests):
            for event in answer_events(index, request.prompt):
                batch.add(event, call)
    assert texts(batch) == requests


def test_failed_call_leaves_requests_of_other_calls() -> None:
    batch = Batch(["a", "b"], max_bytes=1)
    for event in answer_events(0, "A"):
        batch.add(event, call=0)
    batch.fail(Expired("too late"), call=1)
    assert texts(batch) == ["A", Expired]
