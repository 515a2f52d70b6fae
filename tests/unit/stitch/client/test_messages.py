"""Keyword arguments become requests, or an error that names the argument; events become answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stitch.client.answers import (
    Alternative,
    Answer,
    Collector,
    Delta,
    RouteDecision,
    TokenLogprobs,
    ToolCall,
)
from stitch.client.messages import RequestFields, RouteFields, generate_request, route_request
from stitch.errors import InvalidRequest, Unavailable
from stitch.v1 import inference_pb2
from stitch.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Finished,
    FinishReason,
    GenerateResponse,
    Started,
)


def test_generate_request_keeps_whitespace_of_prompt() -> None:
    assert generate_request({"prompt": " two  spaces\n"}).prompt == " two  spaces\n"


def test_generate_request_turns_messages_into_chat() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = generate_request({"messages": turns}).chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("system", "Be brief."), ("user", "Hi")]


def test_generate_request_takes_token_ids_in_place_of_a_prompt() -> None:
    request = generate_request({"token_ids": [3, 4], "prompt": None, "n": 3, "threshold": 0.0})
    assert (list(request.token_ids.ids), request.n, request.threshold) == ([3, 4], 3, 0.0)
    assert request.HasField("threshold")
    assert generate_request({"token_ids": []}).WhichOneof("input") == "token_ids"
    with pytest.raises(InvalidRequest, match="a request has one of: prompt, messages, token_ids"):
        generate_request({"token_ids": [3], "prompt": "x"})
    with pytest.raises(InvalidRequest, match=r"token_ids\[1\] is -1"):
        generate_request({"token_ids": [3, -1]})


@pytest.mark.parametrize(
    ("bias", "field"),
    [
        ([1.0], "logit_bias"),
        ({"x": 1.0}, r"logit_bias\[x\]"),
        ({-1: 1.0}, r"logit_bias\[-1\]"),
        ({4: "a"}, r"logit_bias\[4\]"),
    ],
)
def test_generate_request_names_a_bias_that_is_none(bias: object, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} is"):
        generate_request({"prompt": "x", "logit_bias": bias})


def test_generate_request_takes_the_biases_of_json() -> None:
    assert dict(generate_request({"prompt": "x", "logit_bias": {"42": 5}}).sampling.logit_bias) == {42: 5.0}


def test_generate_request_accepts_empty_prompt() -> None:
    assert generate_request({"prompt": ""}).WhichOneof("input") == "prompt"


def test_generate_request_turns_empty_messages_into_chat() -> None:
    assert generate_request({"messages": []}).WhichOneof("input") == "chat"


def test_generate_request_sets_every_sampling_field() -> None:
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
        "logit_bias": {7: 1.5, 9: -100.0},
        "min_tokens": 2,
    }
    sampling = generate_request({"prompt": "x", **given, "stop_token_ids": [1, 2]}).sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert list(sampling.stop_token_ids) == [1, 2]


def test_request_fields_match_fields_of_proto_messages() -> None:
    nested = inference_pb2.Sampling, inference_pb2.Objectives
    within = {name for message in nested for name in message.DESCRIPTOR.fields_by_name}
    request = set(inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    enclosing = {"prompt", "chat", "sampling", "objectives", "response_format"}
    of_chat = {"messages", *inference_pb2.Chat.DESCRIPTOR.fields_by_name}
    assert set(RequestFields.__annotations__) - {"response_format"} == within | (request - enclosing) | of_chat


OBJECTIVES = {"max_ttft_seconds": 0.5, "max_cost": 0.9, "min_quality": -1.5}


def test_both_requests_set_objectives_and_conversation() -> None:
    fields = {"prompt": "x", **OBJECTIVES, "conversation_id": "mine"}
    for request in (generate_request(fields), route_request(fields)):
        assert {name: getattr(request.objectives, name) for name in OBJECTIVES} == OBJECTIVES
        assert request.conversation_id == "mine"


def test_generate_request_sets_objective_of_zero() -> None:
    assert generate_request({"prompt": "x", "min_quality": 0}).objectives.HasField("min_quality")
    assert not generate_request({"prompt": "x"}).HasField("objectives")


def test_route_fields_match_fields_of_proto_message() -> None:
    request = set(inference_pb2.RouteRequest.DESCRIPTOR.fields_by_name) - {"prompt", "chat", "objectives"}
    within = set(inference_pb2.Objectives.DESCRIPTOR.fields_by_name)
    assert set(RouteFields.__annotations__) == request | within | {"messages"}


def test_route_request_refuses_sampling() -> None:
    with pytest.raises(InvalidRequest, match="a route request has: prompt, messages, conversation_id, max_cost"):
        route_request({"prompt": "x", "temperature": 1.0})


def test_generate_request_omits_none() -> None:
    request = generate_request({"prompt": "x", "temperature": None, "route": None, "messages": None})
    assert not request.HasField("sampling")
    assert request.route == ""


def test_generate_request_sets_temperature_of_zero() -> None:
    assert generate_request({"prompt": "x", "temperature": 0}).sampling.HasField("temperature")


@pytest.mark.parametrize("stop", ["\n\n", ["\n\n"], ("\n\n",)])
def test_generate_request_accepts_stop_as_string_or_list(stop: object) -> None:
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
def test_generate_request_refuses_value_of_wrong_type(field: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request({"prompt": "x", field: value})
    assert str(caught.value) == expected


@pytest.mark.parametrize("prompt", ["\ud800", b"\xff\xfe", 7])
def test_generate_request_refuses_invalid_unicode(prompt: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt is .*, but it must be text in valid Unicode$"):
        generate_request({"prompt": prompt})


def test_generate_request_refuses_unknown_field_and_lists_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"^temprature is 1, but a request has: prompt, messages, .*temperature"):
        generate_request({"prompt": "x", "temprature": 1})


@pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": []}])
def test_generate_request_refuses_no_input_and_two_inputs(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="needs either a prompt or messages"):
        generate_request(fields)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("Hi", "messages is 'Hi', but it must be a list"),
        (["Hi"], "messages[0] is 'Hi', but it must have a role and a content"),
        ([{"role": "user"}], "messages[0] is {'role': 'user'}, but it must have a role and a content"),
        (
            [{"role": "user", "content": "", "id": ""}],
            "messages[0] is {'role': 'user', 'content': '', 'id': ''}, but it has: role, content, tool_calls, "
            "tool_call_id, name",
        ),
        ([{"role": "user", "content": 1}], "messages[0].content is 1, but it must be text in valid Unicode"),
    ],
)
def test_generate_request_refuses_malformed_messages(messages: object, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request({"messages": messages})
    assert str(caught.value) == expected


def test_generate_request_has_tools_and_their_calls() -> None:
    call = ToolCall("abc", "add", '{"a": 1}')
    schema = {"type": "object"}
    request = generate_request(
        {
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": [call, {"id": "x", "name": "y", "arguments": {}}]},
                {"role": "tool", "content": "2", "tool_call_id": "abc"},
            ],
            "tools": [{"name": "add", "parameters": schema, "strict": True}, {"name": "none"}],
            "tool_choice": "add",
            "parallel_tool_calls": False,
            "response_format": {"json_schema": schema},
        }
    )
    first, second = request.chat.messages
    assert [(one.id, one.name, one.arguments) for one in first.tool_calls] == [
        ("abc", "add", '{"a": 1}'),
        ("x", "y", "{}"),
    ]
    assert second.tool_call_id == "abc"
    assert [(tool.name, tool.parameters, tool.strict) for tool in request.chat.tools] == [
        ("add", '{"type": "object"}', True),
        ("none", "", False),
    ]
    assert (request.chat.tool_choice.name, request.chat.parallel_tool_calls) == ("add", False)
    assert request.response_format.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("choice", "mode"),
    [("auto", 1), ("none", 2), ("required", 3), ("AUTO", 0)],
    ids=["auto", "none", "required", "name"],
)
def test_generate_request_has_the_choice_of_tools(choice: str, mode: int) -> None:
    sent = generate_request({"messages": [], "tool_choice": choice}).chat.tool_choice
    assert (sent.mode, sent.name) == (mode, "" if mode else choice)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "x", "tools": []}, "tools is [], but a request with tools has messages"),
        ({"messages": [], "tools": ["x"]}, "tools[0] is 'x', but it must be an object"),
        ({"messages": [], "tools": [{"function": {}}]}, "it has: name, description, parameters, strict"),
        ({"messages": [], "tools": [{"name": "a", "parameters": {1j}}]}, "tools[0].parameters"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "json_schema, json_object, regex, lark"),
        ({"messages": [], "tool_choice": 1}, "tool_choice is 1"),
    ],
)
def test_generate_request_refuses_malformed_tools(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request(fields)
    assert expected in str(caught.value)


def test_answer_has_the_calls_of_its_deltas() -> None:
    calls = [inference_pb2.ToolCallDelta(index=index, id=f"{index}", name="a", arguments="{}") for index in (0, 1)]
    collector = Collector()
    collector.add(GenerateResponse(started={}))
    for call in calls:
        collector.add(GenerateResponse(delta={"tool_calls": [call]}))
    collector.add(GenerateResponse(finished={"reason": inference_pb2.FINISH_REASON_TOOL_CALLS}))
    answer = collector.answer()
    assert answer.finish_reason == "tool_calls"
    assert answer.tool_calls == (ToolCall("0", "a", "{}"), ToolCall("1", "a", "{}"))
    assert answer.as_json()["tool_calls"][1] == {"id": "1", "name": "a", "arguments": "{}"}


def test_route_request_accepts_prompt_or_messages() -> None:
    assert route_request({"prompt": "x"}).prompt == "x"
    turns = [{"role": "user", "content": "x"}]
    assert route_request({"prompt": None, "messages": turns}).chat.messages[0].content == "x"


def started() -> GenerateResponse:
    decision = inference_pb2.RouteDecision(route="weak", score=0.25, reason="short")
    return GenerateResponse(started=Started(decision=decision, prompt_tokens=5))


def delta(text: str, *tokens: int) -> GenerateResponse:
    return GenerateResponse(delta=inference_pb2.Delta(text=text, token_ids=tokens))


def finished(reason: FinishReason = FINISH_REASON_STOP, ttft_seconds: float | None = 0.5) -> GenerateResponse:
    message = Finished(reason=reason, prompt_tokens=5, generated_tokens=3, ttft_seconds=ttft_seconds, total_seconds=2.0)
    message.stages.add(name="route", seconds=0.125)
    return GenerateResponse(finished=message)


def collected(*responses: GenerateResponse) -> Answer:
    collector = Collector()
    for response in responses:
        collector.add(response)
    return collector.answer()


def test_answer_joins_all_events_of_stream() -> None:
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


def test_collector_returns_decision_and_deltas() -> None:
    collector = Collector()
    events = [collector.add(response) for response in (started(), delta("Hi", 1), finished(), GenerateResponse())]
    assert events == [RouteDecision("weak", 0.25, "short", 5), Delta("Hi", (1,), ()), None, None]


def test_answer_reports_length_limit() -> None:
    assert collected(started(), finished(FINISH_REASON_LENGTH)).finish_reason == "length"


def test_answer_without_text_has_no_ttft() -> None:
    answer = collected(started(), finished(ttft_seconds=None))
    assert answer.ttft_seconds is None
    assert answer.text == ""


def test_answer_keeps_ttft_of_zero() -> None:
    assert collected(started(), finished(ttft_seconds=0.0)).ttft_seconds == 0.0


def test_answer_has_logprobs() -> None:
    response = delta("Hi", 1)
    logprobs = response.delta.logprobs.add(token_id=1, logprob=-0.5, token=b"Hi")
    logprobs.alternatives.add(token_id=2, logprob=-1.5, token=b"\xe2")
    answer = collected(started(), response, finished())
    assert answer.logprobs == (TokenLogprobs(1, -0.5, (Alternative(2, -1.5, b"\xe2"),), b"Hi"),)
    other = {"token_id": 2, "token": "\N{REPLACEMENT CHARACTER}", "logprob": -1.5}
    assert answer.as_json()["logprobs"] == [{"token_id": 1, "token": "Hi", "logprob": -0.5, "alternatives": [other]}]


def of(answer: int, response: GenerateResponse) -> GenerateResponse:
    response.answer = answer
    return response


def test_several_answers_are_the_first_one_with_the_others() -> None:
    events = [started(), delta("A", 1), of(1, delta("B", 2)), of(1, finished()), delta("a", 3), finished()]
    answer = collected(*events)
    assert (answer.text, [other.text for other in answer.others]) == ("Aa", ["B"])
    assert (answer.token_ids, answer.others[0].token_ids) == ((1, 3), (2,))
    assert answer.as_json()["others"][0]["text"] == "B"
    with pytest.raises(Unavailable, match="broke off after 3 tokens"):
        collected(*events[:3], *events[4:])


def test_answer_json_has_documented_fields_in_order() -> None:
    fields = json.loads(json.dumps(collected(started(), delta("Hi", 1), finished()).as_json()))
    assert list(fields) == [
        *("text", "token_ids", "route", "score", "reason", "prompt_tokens", "generated_tokens"),
        *("finish_reason", "ttft_seconds", "total_seconds", "stages", "cached_tokens", "replays"),
    ]
    assert fields["token_ids"] == [1]


@pytest.mark.parametrize("responses", [(), (started(), delta("Hi", 1, 2)), (delta("Hi", 1, 2), finished())])
def test_incomplete_stream_is_unavailable(responses: tuple[GenerateResponse, ...]) -> None:
    with pytest.raises(Unavailable, match="broke off after") as caught:
        collected(*responses)
    assert caught.value.generated_tokens == (2 if responses else 0)


def test_stages_are_in_request_order_and_unknown_ones_last() -> None:
    response = finished()
    for name in ("sample", "unheard_of", "bottom_prefill"):
        response.finished.stages.add(name=name, seconds=1.0)
    assert list(collected(started(), response).stages) == ["route", "bottom_prefill", "sample", "unheard_of"]
