"""Responses over HTTP, by OpenAI's own client and types: items in, a response or its events out, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from router_gateway.admission.tenants import hash_key
from router_gateway.http.bodies import parse
from router_gateway.http.errors import Refusal, body_of
from router_gateway.http.responses import LOGPROBS, ResponseBody, ResponseShape
from stitch.errors import Exhausted, Expired, InvalidRequest, StitchError
from stitch.v1 import inference_pb2
from tests.http.conftest import Serve, Served
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, raises, waits_for
from tests.support.openai_replies import checked, response_events
from tests.support.tool_templates import FAMILIES, tool_shards
from tests.support.waiting import eventually

TEXT = "hello world"
# The words of the text, and the token that ends it.
GENERATED = len(tokens(TEXT)) + 1
PATH = "/v1/responses"
UNSUPPORTED = sorted({*get_type_hints(ResponseCreateParamsNonStreaming), "stream"} - set(ResponseBody.model_fields))
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "get_weather", "description": "of a city", "parameters": SCHEMA}
TOOLS = [WEATHER, {"type": "function", "name": "get_time", "strict": None}]
CALL = {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
OPENING = ["created", "in_progress", "output_item.added", "content_part.added"]
CLOSING = ["output_text.done", "content_part.done", "output_item.done"]


def shards(text: str = TEXT) -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens(text)), FakeShard("top-0", "top")


async def ask(served: Served, **fields: Any) -> Any:
    """The reply to an input of one word."""
    return await served.raw.post(PATH, json={"model": "weak", "input": "hello", **fields})


@asynccontextmanager
async def streamed(served: Served) -> AsyncIterator[AsyncIterator[str]]:
    """The text of a stream, as it comes."""
    async with served.raw.stream("POST", PATH, json={"model": "weak", "input": "x", "stream": True}) as response:
        yield response.aiter_text()


def kinds(events: list[Any]) -> list[str]:
    """Their types in short, repeated ones once."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for index, name in enumerate(names) if names[index - 1 : index] != [name]]


def message_of(**fields: Any) -> inference_pb2.GenerateRequest:
    """The message that a body becomes, beside what the gateway itself adds."""
    body = parse(ResponseBody, json.dumps({"model": "auto", "input": "hello", **fields}).encode())
    return body.message("an id", ["weak", "strong"], {})


async def test_reply_has_openais_fields_and_its_own(serve: Serve) -> None:
    async with serve(*shards()) as served:
        response = await ask(served, model="auto", instructions="Be brief.", metadata={"a": "b"}, user="ann", top_p=0.5)
    reply = checked(Response, response.json())
    assert (reply.object, reply.status, reply.model) == ("response", "completed", "weak")
    assert reply.output_text == TEXT
    assert [(item.type, item.status) for item in reply.output] == [("message", "completed")]  # type: ignore[union-attr]
    given = (reply.instructions, reply.metadata, reply.user, reply.top_p, reply.temperature)
    assert given == ("Be brief.", {"a": "b"}, "ann", 0.5, 1)
    assert (reply.tool_choice, reply.tools, reply.parallel_tool_calls, reply.truncation) == (
        "auto",
        [],
        True,
        "disabled",
    )
    assert reply.usage is not None
    assert reply.usage.output_tokens == GENERATED
    assert reply.usage.total_tokens == reply.usage.input_tokens + GENERATED
    own = response.json()["stitch"]
    assert (own["route"], own["replays"]) == ("weak", 0)
    assert response.headers["x-stitch-route"] == "weak"
    assert response.headers["x-stitch-reason"] == own["reason"]
    assert reply.id == f"resp_{response.headers['x-request-id']}"


async def test_events_put_together_are_the_unstreamed_reply(serve: Serve) -> None:
    async with serve(*shards()) as served:
        headers = {"x-request-id": "mine"}
        body = {"model": "weak", "input": "hello", "metadata": {"a": "b"}}
        whole = await served.raw.post(PATH, json=body, headers=headers)
        streamed = await served.raw.post(PATH, json={**body, "stream": True}, headers=headers)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = response_events(streamed.text)
    assert kinds(events) == [*OPENING, "output_text.delta", *CLOSING, "completed"]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(event.delta for event in deltas) == TEXT
    first, last = events[0].response, events[-1].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    expected = checked(Response, whole.json())
    changing = {"created_at", "stitch"}
    assert last.model_dump(exclude=changing) == expected.model_dump(exclude=changing)
    assert last.stitch["route"] == "weak"
    assert {event.item_id for event in deltas} == {last.output[0].id}


async def test_openais_clients_ask_and_stream(serve: Serve) -> None:
    def asked(url: str) -> tuple[str, str]:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            reply = client.responses.create(model="weak", input="hello", store=False)
            with client.responses.stream(model="weak", input="hello") as stream:
                return reply.output_text, stream.get_final_response().output_text

    async with serve(*shards()) as served:
        assert await asyncio.to_thread(asked, served.url) == (TEXT, TEXT)
        stream = await served.client.responses.create(model="strong", input="hello", stream=True)
        events = [event async for event in stream]
    assert kinds(events)[-1] == "completed"


async def test_output_that_comes_back_is_taken_as_it_is(serve: Serve) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    async with serve(bottom, top) as served:
        reply = await served.client.responses.create(model="weak", input="hello", include=[LOGPROBS])
        items = [{"role": "user", "content": "hello"}, *reply.output, {"role": "user", "content": "more"}]
        again = await served.client.responses.create(model="weak", input=items)
        await served.client.chat.completions.create(
            model="weak",
            messages=[
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": TEXT},
                {"role": "user", "content": "more"},
            ],
        )
    assert again.output_text == TEXT
    assert bottom.requests[1].token_ids == bottom.requests[2].token_ids


async def test_answer_that_is_cut_is_incomplete(serve: Serve) -> None:
    async with serve(*shards()) as served:
        reply = checked(Response, (await ask(served, max_output_tokens=1)).json())
        events = response_events((await ask(served, max_output_tokens=1, stream=True)).text)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == reply.output_text


async def test_answer_without_text_is_an_empty_message(serve: Serve) -> None:
    async with serve(*shards("")) as served:
        reply = checked(Response, (await ask(served)).json())
        events = response_events((await ask(served, stream=True)).text)
    assert [(item.type, item.status) for item in reply.output] == [("message", "completed")]  # type: ignore[union-attr]
    assert reply.output_text == ""
    assert kinds(events) == [*OPENING, *CLOSING, "completed"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_one_entry_for_each_token(serve: Serve, stream: bool) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    async with serve(bottom, top) as served:
        response = await ask(served, include=[LOGPROBS], top_logprobs=2, stream=stream)
    if stream:
        events = response_events(response.text)
        deltas = [one for event in events if event.type.endswith("text.delta") for one in event.logprobs]
        assert [one.logprob for one in deltas] == [-0.5] * GENERATED
    reply = events[-1].response if stream else checked(Response, response.json())
    assert reply.top_logprobs == 2
    assert [one.logprob for one in reply.output[0].content[0].logprobs] == [-0.5] * GENERATED


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_functions_are_items(serve: Serve, stream: bool) -> None:
    calls = FAMILIES["qwen2.5"].two_calls
    async with serve(*tool_shards(f"Wait. {calls}")) as served:
        response = await ask(served, tools=TOOLS, stream=stream)
    reply = response_events(response.text)[-1].response if stream else checked(Response, response.json())
    message, *found = reply.output
    assert message.content[0].text.strip() == "Wait."
    assert [(one.name, json.loads(one.arguments)) for one in found] == [
        ("get_weather", {"city": "Paris"}),
        ("get_time", {}),
    ]
    assert len({one.call_id for one in found} | {one.id for one in found}) == 4
    assert {one.status for one in reply.output} == {"completed"}
    assert [tool.model_dump(exclude_none=True) for tool in reply.tools] == [
        WEATHER,
        {"type": "function", "name": "get_time"},
    ]
    if stream:
        call = [
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ]
        expected = [*OPENING, "output_text.delta", *CLOSING, *call * 2, "completed"]
        assert kinds(response_events(response.text)) == expected


def test_parts_of_calls_and_text_between_them_put_together_are_the_items() -> None:
    body = ResponseBody.model_validate({"model": "weak", "input": "x", "tools": TOOLS, "stream": True})
    streaming, whole = (ResponseShape("an id", body, inference_pb2.Sampling()) for _ in range(2))
    deltas = [
        inference_pb2.Delta(tool_calls=[{"id": "a", "name": "get_weather", "arguments": '{"city": '}]),
        inference_pb2.Delta(tool_calls=[{"arguments": '"Rome"}'}]),
        inference_pb2.Delta(text="then", tool_calls=[{"index": 1, "id": "b", "name": "get_time", "arguments": "{}"}]),
        # The token that ends the answer.
        inference_pb2.Delta(logprobs=[{"logprob": -1}]),
    ]
    made = b""
    for delta in deltas:
        response = inference_pb2.GenerateResponse(delta=delta)
        made += streaming.events(response)
        whole.add(response)
    for shape in (streaming, whole):
        shape.finish(0, inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_TOOL_CALLS))
    events = response_events((made + streaming.last_events()).decode())
    reply = checked(Response, whole.whole())
    assert events[-1].response.output == reply.output
    read = [item.content[0].text if item.type == "message" else item.arguments for item in events[-1].response.output]
    assert read == ['{"city": "Rome"}', "then", "{}"]
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert parts == ['{"city": ', '"Rome"}', "{}"]


def test_items_become_turns() -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": one} for one in "ab"]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {**CALL, "id": "fc_1", "status": "completed"},
        {**CALL, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "sun"}]},
        {**CALL, "call_id": "3"},
    ]
    one, two, three = (
        inference_pb2.ToolCall(id=id, name="get_weather", arguments='{"city": "Rome"}') for id in ("1", "2", "3")
    )
    turns = [
        inference_pb2.ChatMessage(role="system", content="in short"),
        inference_pb2.ChatMessage(role="system", content="be brief"),
        inference_pb2.ChatMessage(role="user", content="a\nb"),
        inference_pb2.ChatMessage(role="assistant", content="c", tool_calls=[one, two]),
        inference_pb2.ChatMessage(role="tool", content="rain", tool_call_id="1"),
        inference_pb2.ChatMessage(role="tool", content="sun", tool_call_id="2"),
        inference_pb2.ChatMessage(role="assistant", tool_calls=[three]),
    ]
    assert list(message_of(input=items, instructions="in short").chat.messages) == turns


def test_parameters_are_taken_over() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "stop": "x", "conversation_id": "c"}
    message = message_of(max_output_tokens=7, include=[LOGPROBS], top_logprobs=2, **given)
    expected = inference_pb2.Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=7, max_tokens=7, logprobs=2)
    assert message.sampling == expected
    assert (list(message.stop), message.conversation_id, message.HasField("n")) == (["x"], "c", False)
    chat = message_of(tools=TOOLS, tool_choice={"type": "function", "name": "get_time"}, parallel_tool_calls=False).chat
    assert [(tool.name, tool.description, tool.strict) for tool in chat.tools] == [
        ("get_weather", "of a city", False),
        ("get_time", "", False),
    ]
    assert json.loads(chat.tools[0].parameters) == SCHEMA
    assert chat.tool_choice == inference_pb2.ToolChoice(mode="TOOL_CHOICE_MODE_REQUIRED", name="get_time")
    assert chat.HasField("parallel_tool_calls")
    schema = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}
    assert json.loads(message_of(text={"format": schema}).response_format.json_schema) == SCHEMA
    assert message_of(text={"format": {"type": "json_object"}}).response_format.json_object
    assert not message_of(text={"format": {"type": "text"}}).HasField("response_format")


def test_parameters_that_are_null_are_not_set() -> None:
    assert message_of(**dict.fromkeys(set(ResponseBody.model_fields) - {"model", "input"})) == message_of()
    same: dict[str, Any] = {"store": False, "background": False, "truncation": "disabled", "tool_choice": None}
    assert message_of(**same) == message_of()


async def test_every_unsupported_parameter_is_refused_by_name(serve: Serve) -> None:
    assert {"conversation", "previous_response_id", "prompt", "reasoning", "service_tier"} <= set(UNSUPPORTED)
    async with serve(*shards()) as served:
        replies = {name: await ask(served, **{name: "value"}) for name in UNSUPPORTED}
    assert {name: reply.status_code for name, reply in replies.items()} == dict.fromkeys(UNSUPPORTED, 400)
    assert [reply.json()["error"]["param"] for reply in replies.values()] == UNSUPPORTED


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"model": "auto@much"}, "model"),
    ],
)
def test_invalid_parameter_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidRequest, Refusal)) as caught:
        message_of(**fields)
    assert json.loads(body_of(caught.value))["error"]["param"] == param


async def test_refusals_of_the_pipeline_name_fields_of_the_body(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[tenants.t]\nkeys = ["{hash_key("mine")}"]\nmax_tokens = 100\n')
    bad = {**CALL, "arguments": "{"}
    invalid = {"type": "json_schema", "name": "a", "schema": {"type": "foo"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": "hello " * 2_000}, "input"),
        ({"input": [{"role": "user", "content": "x"}, bad]}, "input[1].arguments"),
        ({"input": [{"role": "assistant", "content": "x"}, CALL, bad]}, "input[2].arguments"),
        ({"text": {"format": invalid}}, "text.format"),
        ({"max_output_tokens": 101}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"stop": ""}, "stop[0]"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": TOOLS}, "tool_choice.name"),
    ]
    async with serve(*tool_shards(), key="mine", keys=str(keys)) as served:
        replies = [await ask(served, **fields) for fields, _ in cases]
    assert [reply.status_code for reply in replies] == [400] * len(cases)
    assert [reply.json()["error"]["param"] for reply in replies] == [param for _, param in cases]
    assert replies[1].json()["error"]["message"].startswith("input[1].arguments is '{', but")


@pytest.mark.parametrize("token", [0, 1])
async def test_error_has_a_status_until_the_first_event_then_the_response_fails(serve: Serve, token: int) -> None:
    bottom, top = shards()
    async with serve(bottom, top) as served:
        bottom.faults[token] = raises(Expired("too late"))
        response = await ask(served, stream=True)
    if not token:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        return
    events = response_events(response.text)
    assert kinds(events)[-3:] == ["content_part.done", "output_item.done", "failed"]
    failed = events[-1].response
    assert (failed.status, failed.error.code, failed.output[0].status) == ("failed", "server_error", "incomplete")
    assert failed.error.message == "too late"
    assert failed.output_text
    assert TEXT.startswith(failed.output_text)


@pytest.mark.parametrize(
    ("error", "code"),
    [(Exhausted("no room"), "rate_limit_exceeded"), (InvalidRequest("input", "x", "y"), "invalid_prompt")],
)
def test_failed_response_has_openais_code(error: StitchError, code: str) -> None:
    body = ResponseBody.model_validate({"model": "weak", "input": "x", "stream": True})
    *_, event = response_events(ResponseShape("an id", body, inference_pb2.Sampling()).error_events(error).decode())
    assert (event.response.error.code, event.response.error.message) == (code, str(error))


async def test_stream_that_fails_before_any_text_has_its_first_event(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router_gateway.http.calls.COMMENT_SECONDS", 0.02)
    bottom, top = shards()
    hold = asyncio.Event()
    bottom.faults[0] = waits_for(hold)
    async with serve(bottom, top) as served, streamed(served) as read:
        comment = await anext(read)
        await served.gateway.stop()
        text = comment + "".join([part async for part in read])
    assert kinds(response_events(text)) == ["created", "in_progress", "failed"]


async def test_first_event_leaves_before_the_second_token_exists(serve: Serve) -> None:
    bottom, top = shards()
    bottom.script_waits = asyncio.Event()
    async with serve(bottom, top) as served, streamed(served) as read:
        first = await anext(read)
        assert kinds(response_events(first)) == [*OPENING, "output_text.delta"]
        assert not bottom.script_waits.is_set()
        bottom.script_waits.set()
        rest = "".join([part async for part in read])
    assert kinds(response_events(first + rest))[-1] == "completed"


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_goes_away_cancels_its_session(serve: Serve, stream: bool) -> None:
    bottom, top = shards()
    bottom.faults[1] = waits_for(asyncio.Event())
    async with serve(bottom, top) as served:
        asking = asyncio.create_task(ask(served, stream=stream))
        await eventually(lambda: not bottom.faults)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: bottom.cancelled == 1 and bottom.running == 0)


async def test_openais_client_raises_its_errors(serve: Serve) -> None:
    async with serve(*shards()) as served:
        with pytest.raises(openai.NotFoundError):
            await served.client.responses.create(model="none", input="x")
        with pytest.raises(openai.BadRequestError) as caught:
            await served.client.responses.create(model="weak", input="x", previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError):
            await served.client.responses.retrieve("resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "unsupported_parameter")
