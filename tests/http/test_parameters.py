"""Every parameter of OpenAI's chat completions is taken over into the gateway's message, or refused by its name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from router_gateway.http.bodies import MAX_FIELDS, UNCOUNTED_BYTES, parse
from router_gateway.http.chat import ChatBody
from router_gateway.http.errors import Refusal, body_of
from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2
from tests.http.conftest import USER, Serve
from tests.support.byte_tokenizer import tokenizer_files, tokens
from tests.support.fake_shard import FakeShard

OPENAI = {*get_type_hints(CompletionCreateParamsNonStreaming), "stream"}
UNSUPPORTED = sorted(OPENAI - set(ChatBody.model_fields))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")


async def test_every_unsupported_parameter_is_refused_by_name(serve: Serve) -> None:
    assert {"audio", "functions", "store", "web_search_options"} <= set(UNSUPPORTED)
    async with serve(*shards()) as served:
        replies = {name: await served.chat(**{name: "value"}) for name in UNSUPPORTED}
    assert {name: reply.status_code for name, reply in replies.items()} == dict.fromkeys(UNSUPPORTED, 400)
    assert [reply.json()["error"]["param"] for reply in replies.values()] == UNSUPPORTED


def message_of(**fields: Any) -> inference_pb2.GenerateRequest:
    """The message that a body becomes, beside what the gateway itself adds."""
    body = parse(ChatBody, json.dumps({"model": "auto", "messages": USER, **fields}).encode())
    return body.message("an id", ["weak", "strong"], {})


def test_sampling_is_taken_over() -> None:
    sampling = message_of(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=-1,
        max_completion_tokens=7,
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        logit_bias={"7": -100},
        min_tokens=2,
    ).sampling
    assert sampling == inference_pb2.Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=2**64 - 1,
        max_tokens=7,
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=2,
        logit_bias={7: -100},
        min_tokens=2,
    )


def test_parameters_that_are_null_are_not_set() -> None:
    supported = set(ChatBody.model_fields) - {"model", "messages"}
    assert message_of(**dict.fromkeys(supported)) == message_of()
    assert message_of().sampling == inference_pb2.Sampling(temperature=1, top_p=1)


def test_routing_is_taken_over() -> None:
    objectives = {"max_ttft_seconds": 0.5, "max_cost": 0.6, "min_quality": 0.7}
    message = message_of(model="auto@0.4", objectives=objectives, conversation_id="c", n=3, stop=["a", "b"])
    assert (message.route, message.threshold, message.conversation_id, message.n) == ("auto", 0.4, "c", 3)
    assert message.objectives == inference_pb2.Objectives(**objectives)
    assert list(message.stop) == ["a", "b"]
    assert not message_of(model="weak").HasField("threshold")


def test_conversation_is_taken_over() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    chat = message_of(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "rain", "tool_call_id": "1"},
        ]
    ).chat
    assert list(chat.messages) == [
        inference_pb2.ChatMessage(role="system", content="be brief"),
        inference_pb2.ChatMessage(role="user", content="a\nb", name="ann"),
        inference_pb2.ChatMessage(
            role="assistant", tool_calls=[inference_pb2.ToolCall(id="1", name="weather", arguments="{}")]
        ),
        inference_pb2.ChatMessage(role="tool", content="rain", tool_call_id="1"),
    ]


def test_tools_and_formats_are_taken_over() -> None:
    function = {"name": "weather", "description": "of a city", "parameters": SCHEMA, "strict": True}
    message = message_of(
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    )
    assert message.chat.tools[0] == inference_pb2.Tool(
        name="weather", description="of a city", parameters=json.dumps(SCHEMA), strict=True
    )
    assert message.chat.tool_choice == inference_pb2.ToolChoice(mode="TOOL_CHOICE_MODE_REQUIRED", name="weather")
    assert message.chat.HasField("parallel_tool_calls")
    assert json.loads(message.response_format.json_schema) == SCHEMA
    assert message_of(response_format={"type": "json_object"}).response_format.json_object
    assert not message_of(response_format={"type": "text"}).HasField("response_format")
    assert message_of(tool_choice="none").chat.tool_choice.mode == inference_pb2.TOOL_CHOICE_MODE_NONE


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"objectives": {"speed": 1}}, "objectives.speed"),
        ({"model": "auto@much"}, "model"),
    ],
)
def test_invalid_parameter_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidRequest, Refusal)) as caught:
        message_of(**fields)
    assert json.loads(body_of(caught.value))["error"]["param"] == param


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b'{"model": NaN}', b'"\\ud800"', b"[" * 100_000, b"[]", b"1" * 99_999]
)
def test_body_that_is_no_object_of_json_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^body is|^model is"):
        parse(ChatBody, content)


def test_large_bodies_are_counted_before_a_model_is_built() -> None:
    unknown = json.dumps({f"field {number}": 1 for number in range(MAX_FIELDS + 1)}).encode()
    assert len(unknown) > UNCOUNTED_BYTES
    with pytest.raises(InvalidRequest, match="more than 8,192 values"):
        parse(ChatBody, unknown)
    with pytest.raises(InvalidRequest, match="more than 8,192 values"):
        parse(ChatBody, b'{"messages": [' + b"{}," * MAX_FIELDS * 2 + b"{}]}")


def test_long_list_ends_at_its_first_invalid_item() -> None:
    with pytest.raises(InvalidRequest, match=r"^stop\[0\] is 1"):
        parse(ChatBody, json.dumps({"model": "auto", "messages": USER, "stop": [1] * 100_000}).encode())


async def test_defaults_are_the_models_then_openais(serve: Serve) -> None:
    bottom, top = shards()
    config = {"eos_token_id": [2, 0], "temperature": 0.7, "top_k": 20, "do_sample": True}
    bottom.files = tokenizer_files() | {"generation_config.json": json.dumps(config).encode()}
    async with serve(bottom, top) as served:
        await served.chat()
        await served.chat(temperature=0.2, top_k=0)
    first, second = (request.sampling for request in bottom.requests)
    assert (first.temperature, first.top_k, first.top_p) == (0.7, 20, 1)
    assert (second.temperature, second.top_k) == (0.2, 0)
