"""Keyword arguments become messages, or an error that names the argument. Knows no gateway."""

from __future__ import annotations

from typing import Any

import pytest

from stitch.client.requests import RequestFields, RouteFields, generate_request, route_request
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2


def test_a_prompt_travels_as_it_is() -> None:
    assert generate_request({"prompt": " two  spaces\n"}).prompt == " two  spaces\n"


def test_messages_become_a_chat() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = generate_request({"messages": turns}).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("system", "Be brief."), ("user", "Hi")]


def test_an_empty_prompt_is_left_to_the_gateway_to_refuse() -> None:
    assert generate_request({"prompt": ""}).WhichOneof("input") == "prompt"


def test_an_empty_conversation_is_still_a_conversation() -> None:
    assert generate_request({"messages": []}).WhichOneof("input") == "chat"


def test_every_sampling_field_arrives() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "seed": 2**64 - 1,
        "max_tokens": 3,
        "ignore_eos": True,
        "logprobs": 2,
    }
    sampling = generate_request({"prompt": "x", **given, "stop_token_ids": [1, 2]}).sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert list(sampling.stop_token_ids) == [1, 2]


def test_the_fields_of_a_request_are_those_of_the_messages() -> None:
    parts = inference_pb2.Sampling, inference_pb2.Objectives
    within = {name for part in parts for name in part.DESCRIPTOR.fields_by_name}
    request = set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert set(RequestFields.__annotations__) == within | (request - {"prompt", "chat", "sampling", "objectives"}) | {
        "messages"
    }


OBJECTIVES = {"max_ttft_seconds": 0.5, "max_cost": 0.9, "min_quality": -1.5}


def test_objectives_and_conversation_arrive() -> None:
    fields = {"prompt": "x", **OBJECTIVES, "conversation_id": "mine"}
    for request in (generate_request(fields), route_request(fields)):
        assert {name: getattr(request.objectives, name) for name in OBJECTIVES} == OBJECTIVES
        assert request.conversation_id == "mine"


def test_an_objective_of_zero_is_not_left_out() -> None:
    assert generate_request({"prompt": "x", "min_quality": 0}).objectives.HasField("min_quality")
    assert not generate_request({"prompt": "x"}).HasField("objectives")


def test_the_fields_of_a_judgement_are_those_of_its_message() -> None:
    request = set(inference_pb2.RouteRequest.DESCRIPTOR.fields_by_name) - {"prompt", "chat", "objectives"}
    within = set(inference_pb2.Objectives.DESCRIPTOR.fields_by_name)
    assert set(RouteFields.__annotations__) == request | within | {"messages"}


def test_a_judgement_takes_no_sampling() -> None:
    with pytest.raises(InvalidRequest, match="a judgement takes: prompt, messages, conversation_id, max_cost"):
        route_request({"prompt": "x", "temperature": 1.0})


def test_what_is_none_is_not_set() -> None:
    request = generate_request({"prompt": "x", "temperature": None, "route": None, "messages": None})
    assert not request.HasField("sampling")
    assert request.route == ""


def test_zero_is_set_and_differs_from_absent() -> None:
    assert generate_request({"prompt": "x", "temperature": 0}).sampling.HasField("temperature")


@pytest.mark.parametrize("stop", ["\n\n", ["\n\n"], ("\n\n",)])
def test_one_stop_string_needs_no_list(stop: object) -> None:
    assert list(generate_request({"prompt": "x", "stop": stop}).stop) == ["\n\n"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", "hot", "temperature is 'hot', but it must be a number"),
        ("temperature", True, "temperature is True, but it must be a number"),
        ("max_tokens", 1.5, "max_tokens is 1.5, but it must be a whole number of 32 bits"),
        ("max_tokens", True, "max_tokens is True, but it must be a whole number of 32 bits"),
        ("max_tokens", 2**31, "max_tokens is 2147483648, but it must be a whole number of 32 bits"),
        ("top_k", -1, "top_k is -1, but it must be a whole number from 0 to 4294967295"),
        ("seed", 2**64, "seed is 18446744073709551616, but it must be a whole number from 0 to 18446744073709551615"),
        ("ignore_eos", 1, "ignore_eos is 1, but it must be true or false"),
        ("stop", 3, "stop is 3, but it must be a list"),
        ("stop", ["x", 3], "stop[1] is 3, but it must be text in valid Unicode"),
        ("stop_token_ids", [-5], "stop_token_ids[0] is -5, but it must be a whole number from 0 to 4294967295"),
        ("route", ["weak"], "route is ['weak'], but it must be text in valid Unicode"),
    ],
)
def test_a_value_that_cannot_travel_is_named(field: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request({"prompt": "x", field: value})
    assert str(caught.value) == expected


@pytest.mark.parametrize("prompt", ["\ud800", b"\xff\xfe", 7])
def test_a_prompt_is_valid_text(prompt: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt is .*, but it must be text in valid Unicode$"):
        generate_request({"prompt": prompt})


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"^temprature is 1, but a request has: prompt, messages, .*temperature"):
        generate_request({"prompt": "x", "temprature": 1})


@pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": []}])
def test_a_request_has_one_input(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="needs a prompt or messages, one of the two"):
        generate_request(fields)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("Hi", "messages is 'Hi', but it must be a list"),
        (["Hi"], "messages[0] is 'Hi', but it must have a role and a content, nothing else"),
        ([{"role": "user"}], "messages[0] is {'role': 'user'}, but it must have a role and a content, nothing else"),
        ([{"role": "user", "content": 1}], "messages[0].content is 1, but it must be text in valid Unicode"),
    ],
)
def test_a_turn_has_a_role_and_a_content(messages: object, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request({"messages": messages})
    assert str(caught.value) == expected


def test_a_judgement_is_asked_for_with_the_same_input() -> None:
    assert route_request({"prompt": "x"}).prompt == "x"
    turns = [{"role": "user", "content": "x"}]
    assert route_request({"prompt": None, "messages": turns}).chat.messages[0].content == "x"
