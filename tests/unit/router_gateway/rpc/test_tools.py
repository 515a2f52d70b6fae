"""Tools, formats and calls through a whole gateway over fake shards, as a client sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from stitch.errors import from_rpc_error
from stitch.grammar import MAX_GRAMMAR_BYTES
from stitch.v1 import inference_pb2, shard_pb2
from tests.support.fake_shard import FakeShard
from tests.support.tool_templates import FAMILIES
from tests.support.tool_templates import tool_shards as shards
from tests.unit.router_gateway.conftest import Reach

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = (
    inference_pb2.Tool(name="get_weather", description="Says how it is.", parameters=json.dumps(CITY)),
    inference_pb2.Tool(name="get_time"),
)
TOOL_CALLS, STOP, LENGTH = (
    inference_pb2.FINISH_REASON_TOOL_CALLS,
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
)


def chat(*tools: inference_pb2.Tool, **fields: Any) -> inference_pb2.Chat:
    return inference_pb2.Chat(messages=[{"role": "user", "content": "x"}], tools=tools, **fields)


def parts(
    events: Sequence[inference_pb2.GenerateResponse],
) -> tuple[str, list[tuple[int, str, Any]], inference_pb2.FinishReason]:
    """Content, calls by index, and why the answer ended."""
    calls = [call for event in events for call in event.delta.tool_calls]
    assert len({call.id for call in calls}) == len(calls)
    content = "".join(event.delta.text for event in events)
    return content, [(call.index, call.name, json.loads(call.arguments)) for call in calls], events[-1].finished.reason


@pytest.mark.parametrize("family", FAMILIES)
async def test_calls_of_an_answer_are_no_text(reach: Reach, family: str) -> None:
    text = FAMILIES[family].two_calls or FAMILIES[family].one_call
    bottom, top = shards(text, family)
    async with reach(bottom, top) as gateway:
        events = await gateway.generate(prompt=None, chat=chat(*TOOLS))
    expected = [(0, "get_weather", {"city": "Paris"}), (1, "get_time", {})]
    count = 2 if FAMILIES[family].two_calls else 1
    assert parts(events) == ("", expected[:count], TOOL_CALLS)
    ids = [token for event in events for token in event.delta.token_ids]
    assert ids[: len(bottom.script)] == bottom.script
    assert not bottom.requests[0].HasField("grammar")


async def test_second_call_is_left_out_where_calls_are_not_parallel(reach: Reach) -> None:
    async with reach(*shards(f"{FAMILIES['qwen2.5'].two_calls}")) as gateway:
        events = await gateway.generate(prompt=None, chat=chat(*TOOLS, parallel_tool_calls=False))
    assert parts(events) == ("", [(0, "get_weather", {"city": "Paris"})], TOOL_CALLS)


@pytest.mark.parametrize(
    ("text", "sampling", "reason"),
    [("a <tool_call>\nno JSON", {}, STOP), (FAMILIES["qwen2.5"].one_call, {"max_tokens": 9}, LENGTH)],
)
async def test_text_that_is_no_whole_call_is_content(
    reach: Reach, text: str, sampling: dict[str, int], reason: inference_pb2.FinishReason
) -> None:
    async with reach(*shards(text)) as gateway:
        events = await gateway.generate(prompt=None, chat=chat(*TOOLS), sampling=inference_pb2.Sampling(**sampling))
    content, calls, ended = parts(events)
    assert content
    assert text.startswith(content)
    assert (calls, ended) == ([], reason)


async def test_answer_is_text_where_no_tool_may_be_called(reach: Reach) -> None:
    text, none = FAMILIES["qwen2.5"].one_call, {"mode": inference_pb2.TOOL_CHOICE_MODE_NONE}
    bottom, top = shards(text)
    async with reach(bottom, top) as gateway:
        events = await gateway.generate(prompt=None, chat=chat(*TOOLS, tool_choice=none))
        await gateway.generate(prompt=None, chat=chat())
    assert parts(events) == (text, [], STOP)
    assert bottom.requests[0].token_ids == bottom.requests[1].token_ids


async def test_required_or_named_tool_reaches_the_shard_as_a_grammar(reach: Reach) -> None:
    bottom, top = shards(FAMILIES["qwen2.5"].one_call)
    required = {"mode": inference_pb2.TOOL_CHOICE_MODE_REQUIRED}
    async with reach(bottom, top) as gateway:
        await gateway.generate(prompt=None, chat=chat(*TOOLS, tool_choice=required))
        events = await gateway.generate(prompt=None, chat=chat(*TOOLS, tool_choice={"name": "get_weather"}))
    both, named = (request.grammar.lark for request in bottom.requests)
    assert ("get_time" in both, "get_time" in named) == (True, False)
    assert parts(events)[1:] == ([(0, "get_weather", {"city": "Paris"})], TOOL_CALLS)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"json_schema": json.dumps(CITY)}, shard_pb2.Grammar(json_schema=json.dumps(CITY))),
        ({"json_object": True}, shard_pb2.Grammar(json_schema='{"type": "object"}')),
        ({"regex": "[a-z]+"}, shard_pb2.Grammar(regex="[a-z]+")),
        ({"lark": 'start: "x"'}, shard_pb2.Grammar(lark='start: "x"')),
        ({"json_object": False}, shard_pb2.Grammar()),
    ],
)
async def test_response_format_reaches_the_shard(reach: Reach, given: dict[str, Any], sent: shard_pb2.Grammar) -> None:
    bottom, top = shards("x")
    async with reach(bottom, top) as gateway:
        await gateway.generate(response_format=inference_pb2.ResponseFormat(**given))
    assert bottom.requests[0].grammar == sent


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": ({"response_format": {"json_schema": "{"}}, "response_format.json_schema"),
    "no object": ({"response_format": {"json_schema": "[]"}}, "must be a JSON object"),
    "unknown type": ({"response_format": {"json_schema": '{"type": "foo"}'}}, "Invalid type: foo"),
    "unknown keyword": ({"response_format": {"json_schema": '{"dependentSchemas": {}}'}}, "response_format"),
    "no regex": ({"response_format": {"regex": "a("}}, "unclosed group"),
    "no grammar": ({"response_format": {"lark": "start: x"}}, "unknown name"),
    "too long": ({"response_format": {"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}}, "at most 65,536"),
    "past the end": ({"response_format": {"regex": "a"}, "sampling": {"ignore_eos": True}}, "sampling.ignore_eos"),
    "at least": ({"response_format": {"regex": "a"}, "sampling": {"min_tokens": 2}}, "sampling.min_tokens"),
    "other forced tokens": (
        {"response_format": {"regex": "a"}, "sampling": {"forced_token_ids": [66]}},
        "sampling.forced_token_ids[0]",
    ),
    "other forced answer": ({"response_format": {"regex": "a"}, "forced_answer": "b"}, "forced_token_ids[0]"),
    "two tools of a name": ({"chat": chat(TOOLS[1], TOOLS[1])}, "name of its own"),
    "no name": ({"chat": chat(inference_pb2.Tool(name="a b"))}, "chat.tools[0].name"),
    "no schema": ({"chat": chat(inference_pb2.Tool(name="a", parameters="["))}, "chat.tools[0].parameters"),
    "no object's schema": (
        {"chat": chat(inference_pb2.Tool(name="a", parameters='{"type": "string"}'))},
        "the JSON schema of an object",
    ),
    "too many tools": ({"chat": chat(*(inference_pb2.Tool(name=f"t{i}") for i in range(129)))}, "at most 128"),
    "unknown choice": ({"chat": chat(*TOOLS, tool_choice={"name": "other"})}, "chat.tool_choice.name"),
    "choice of none": ({"chat": chat(tool_choice={"mode": 3})}, "there are no tools"),
    "invalid strict tool": (
        {"chat": chat(inference_pb2.Tool(name="a", parameters='{"properties": {"b": {"type": "c"}}}', strict=True))},
        "Invalid type: c",
    ),
    "invalid arguments": (
        {"chat": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "{"}]}]}},
        "chat.messages[0].tool_calls[0].arguments",
    ),
}


async def test_invalid_requests_are_refused_before_any_shard_is_asked(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        for name, (fields, reason) in REFUSED.items():
            given = {"prompt": None} | fields if "chat" in fields else fields
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.generate(**given)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert reason in str(from_rpc_error(refused.value)), name
    assert not bottom.requests


async def test_tools_are_refused_where_the_template_shows_none(reach: Reach) -> None:
    bottom, top = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "{}"}]}
    async with reach(bottom, top) as gateway:
        for given in [chat(*TOOLS), inference_pb2.Chat(messages=[{"role": "user", "content": "x"}, call])]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.generate(prompt=None, chat=given)
            said = refused.value.details()
            assert said is not None
            assert "the chat template can't show them: it shows no tools" in said
    assert not bottom.requests
