"""Response messages become answers. Knows no connection."""

from __future__ import annotations

import json

import pytest

from stitch.client.answers import Alternative, Answer, Collector, Delta, RouteDecision, TokenLogprobs
from stitch.errors import Unavailable
from stitch.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Finished,
    FinishReason,
    GenerateResponse,
    Started,
)
from stitch.v1.inference_pb2 import Delta as DeltaMessage
from stitch.v1.inference_pb2 import RouteDecision as JudgementMessage


def started() -> GenerateResponse:
    decision = JudgementMessage(route="weak", score=0.25, reason="short")
    return GenerateResponse(started=Started(decision=decision, prompt_tokens=5))


def delta(text: str, *tokens: int) -> GenerateResponse:
    return GenerateResponse(delta=DeltaMessage(text=text, token_ids=tokens))


def finished(reason: FinishReason = FINISH_REASON_STOP, ttft_seconds: float | None = 0.5) -> GenerateResponse:
    ending = Finished(reason=reason, prompt_tokens=5, generated_tokens=3, ttft_seconds=ttft_seconds, total_seconds=2.0)
    ending.stages.add(name="route", seconds=0.125)
    return GenerateResponse(finished=ending)


def collected(*responses: GenerateResponse) -> Answer:
    collector = Collector()
    for response in responses:
        collector.take(response)
    return collector.answer()


def test_an_answer_is_all_of_its_stream() -> None:
    answer = collected(started(), delta("Hel", 1), delta("lo", 2, 3), finished())
    assert answer == Answer(
        text="Hello",
        token_ids=(1, 2, 3),
        route="weak",
        score=0.25,
        reason="short",
        prompt_tokens=5,
        generated_tokens=3,
        finish_reason="stop",
        ttft_seconds=0.5,
        total_seconds=2.0,
        stages={"route": 0.125},
    )


def test_a_reader_sees_the_judgement_and_the_pieces() -> None:
    collector = Collector()
    events = [collector.take(response) for response in (started(), delta("Hi", 1), finished(), GenerateResponse())]
    assert events == [RouteDecision("weak", 0.25, "short", 5), Delta("Hi", (1,), ()), None, None]


def test_an_answer_at_its_limit_says_so() -> None:
    assert collected(started(), finished(FINISH_REASON_LENGTH)).finish_reason == "length"


def test_without_text_there_is_no_time_to_first_token() -> None:
    answer = collected(started(), finished(ttft_seconds=None))
    assert answer.ttft_seconds is None
    assert answer.text == ""


def test_a_time_of_zero_is_a_time() -> None:
    assert collected(started(), finished(ttft_seconds=0.0)).ttft_seconds == 0.0


def test_logprobs_come_along() -> None:
    response = delta("Hi", 1)
    response.delta.logprobs.add(token_id=1, logprob=-0.5).alternatives.add(token_id=2, logprob=-1.5)
    answer = collected(started(), response, finished())
    assert answer.logprobs == (TokenLogprobs(1, -0.5, (Alternative(2, -1.5),)),)
    assert answer.as_json()["logprobs"] == [
        {"token_id": 1, "logprob": -0.5, "alternatives": [{"token_id": 2, "logprob": -1.5}]}
    ]


def test_json_has_the_documented_fields_in_their_order() -> None:
    fields = json.loads(json.dumps(collected(started(), delta("Hi", 1), finished()).as_json()))
    assert list(fields) == [
        *("text", "token_ids", "route", "score", "reason", "prompt_tokens", "generated_tokens"),
        *("finish_reason", "ttft_seconds", "total_seconds", "stages"),
    ]
    assert fields["token_ids"] == [1]


@pytest.mark.parametrize("responses", [(), (started(), delta("Hi", 1, 2)), (delta("Hi", 1, 2), finished())])
def test_half_a_stream_is_no_answer(responses: tuple[GenerateResponse, ...]) -> None:
    with pytest.raises(Unavailable, match="before its end") as caught:
        collected(*responses)
    assert caught.value.generated_tokens == (2 if responses else 0)


def test_stages_come_in_the_order_of_a_request_s_life() -> None:
    response = finished()
    for name in ("sample", "unheard_of", "bottom_prefill"):
        response.finished.stages.add(name=name, seconds=1.0)
    assert list(collected(started(), response).stages) == ["route", "bottom_prefill", "sample", "unheard_of"]
