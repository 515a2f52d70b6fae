"""Messages to values and back: what is unset, and what is refused."""

from __future__ import annotations

import math

import pytest

from router_gateway.requests.types import Delta, Finished, FinishReason, Stage, Started, Token, Turn
from router_gateway.routing.objectives import Objectives
from router_gateway.routing.router import RouteDecision
from router_gateway.rpc.messages import to_prompt, to_question, to_request, to_response
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

EMPTY = inference_pb2.ChatMessage()


def message(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"prompt": "hello"} | fields))  # type: ignore[arg-type]


def test_what_is_unset_takes_its_default() -> None:
    request = to_request(message())
    assert request.prompt == "hello"
    assert (request.route, request.stop) == (None, ())
    assert request.sampling.greedy
    assert len(request.request_id) == 32


def test_ids_and_seeds_are_drawn_anew_for_every_request() -> None:
    first, second = to_request(message()), to_request(message())
    assert first.request_id != second.request_id
    assert first.sampling.seed != second.sampling.seed


def test_what_is_set_stays() -> None:
    sampling = inference_pb2.Sampling(seed=0, temperature=0.5, max_tokens=7)
    request = to_request(message(request_id="mine", route="strong", stop=["a", "b"], sampling=sampling))
    assert (request.request_id, request.route, request.stop) == ("mine", "strong", ("a", "b"))
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.max_tokens) == (0, 0.5, 7)


def test_auto_is_no_route() -> None:
    assert to_request(message(route="auto")).route is None


def test_objectives_that_are_not_set_ask_for_nothing() -> None:
    assert not to_request(message()).objectives.given
    given = inference_pb2.Objectives(max_cost=1.0, min_quality=0.0)
    assert to_request(message(objectives=given)).objectives == Objectives(max_cost=1.0, min_quality=0.0)


def test_a_question_is_a_request_that_is_only_judged() -> None:
    objectives = inference_pb2.Objectives(max_ttft_seconds=2.0)
    question = to_question(inference_pb2.RouteRequest(prompt="hi", objectives=objectives, conversation_id="mine"))
    assert (question.prompt, question.conversation_id, question.route) == ("hi", "mine", None)
    assert question.objectives == Objectives(max_ttft_seconds=2.0)
    with pytest.raises(InvalidRequest, match=r"objectives\.max_cost"):
        to_question(inference_pb2.RouteRequest(prompt="hi", objectives=inference_pb2.Objectives(max_cost=2)))


def test_a_conversation_keeps_its_turns() -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    assert to_prompt(inference_pb2.RouteRequest(chat=chat)) == (Turn("user", "hi"),)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (inference_pb2.GenerateRequest(), "input"),
        (message(request_id="x" * 129), "request_id"),
        (message(request_id="mine\nnext line"), "request_id"),
        (message(conversation_id="x" * 129), "conversation_id"),
        (message(conversation_id="mine\x00"), "conversation_id"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=0)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=math.inf)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_ttft_seconds=math.nan)), "objectives.max_ttft_seconds"),
        (message(objectives=inference_pb2.Objectives(max_cost=0)), "objectives.max_cost"),
        (message(objectives=inference_pb2.Objectives(max_cost=1.01)), "objectives.max_cost"),
        (message(objectives=inference_pb2.Objectives(min_quality=math.nan)), "objectives.min_quality"),
        (message(stop=["a", ""]), "stop[1]"),
        (message(stop=["a"] * 1_000_000), "stop"),
        (message(sampling=inference_pb2.Sampling(stop_token_ids=[1] * 1_025)), "sampling.stop_token_ids"),
        (message(chat=inference_pb2.Chat(messages=[EMPTY] * 32_769)), "chat.messages"),
        (message(sampling=inference_pb2.Sampling(max_tokens=0)), "sampling.max_tokens"),
        (message(sampling=inference_pb2.Sampling(temperature=-1)), "sampling.temperature"),
        (message(sampling=inference_pb2.Sampling(top_p=2)), "sampling.top_p"),
        (message(sampling=inference_pb2.Sampling(min_p=float("nan"))), "sampling.min_p"),
    ],
)
def test_what_is_outside_of_its_limits_is_refused(bad: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(bad)
    assert caught.value.field == field


def test_events_become_messages() -> None:
    started = to_response(Started("id", RouteDecision("weak", 0.25, "why", "length"), 3)).started
    assert (started.request_id, started.decision.route, started.decision.reason) == ("id", "weak", "why")
    assert (started.decision.score, started.prompt_tokens) == (0.25, 3)

    logprobs = inference_pb2.TokenLogprobs(token_id=8, logprob=-1.5)
    delta = to_response(Delta("text", (Token(7), Token(8, logprobs)))).delta
    assert (delta.text, list(delta.token_ids), list(delta.logprobs)) == ("text", [7, 8], [logprobs])

    finished = to_response(Finished(FinishReason.LENGTH, 3, 2, 0.5, 1.5, (Stage("route", 0.1),))).finished
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert (finished.prompt_tokens, finished.generated_tokens) == (3, 2)
    assert (finished.ttft_seconds, finished.total_seconds) == (0.5, 1.5)
    assert [(stage.name, stage.seconds) for stage in finished.stages] == [("route", 0.1)]


def test_an_answer_without_text_has_no_time_to_its_first() -> None:
    finished = to_response(Finished(FinishReason.STOP, 3, 0, None, 1.5, ())).finished
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert not finished.HasField("ttft_seconds")
