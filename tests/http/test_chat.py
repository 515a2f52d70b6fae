"""Chat completions over HTTP, by OpenAI's own client and types: replies, chunks, errors, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from router_gateway.admission.tenants import hash_key
from router_gateway.http.chat import ChatBody, ChatShape
from router_gateway.http.generation import DONE
from stitch.errors import Exhausted, Expired, Unavailable
from stitch.v1 import inference_pb2
from tests.http.conftest import USER, Serve
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard, raises, waits_for
from tests.support.openai_replies import checked, chunks, events
from tests.support.waiting import eventually

TEXT = "hello world"
# The words of the text, and the token that ends it.
GENERATED = len(tokens(TEXT)) + 1


def shards(text: str = TEXT) -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", tokens(text)), FakeShard("top-0", "top")


async def test_reply_has_openais_fields_and_its_own(serve: Serve) -> None:
    async with serve(*shards()) as served:
        response = await served.chat(model="auto")
    reply = checked(ChatCompletion, response.json())
    assert reply.object == "chat.completion"
    assert reply.model == "weak"
    assert reply.choices[0].message.model_dump(exclude_none=True) == {"content": TEXT, "role": "assistant"}
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == GENERATED
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + GENERATED
    own = response.json()["stitch"]
    assert (own["route"], own["replays"]) == ("weak", 0)
    assert 0 < own["score"] < 1
    assert own["stages"]["bottom_prefill"] == 0.25
    assert response.headers["x-stitch-route"] == "weak"
    assert float(response.headers["x-stitch-score"]) == pytest.approx(own["score"], rel=1e-4)
    assert response.headers["x-stitch-reason"] == own["reason"]
    assert reply.id == f"chatcmpl-{response.headers['x-request-id']}"


@pytest.mark.parametrize("include_usage", [False, True])
async def test_chunks_put_together_are_the_unstreamed_reply(serve: Serve, include_usage: bool) -> None:
    async with serve(*shards()) as served:
        whole = (await served.chat()).json()
        streamed = await served.chat(stream=True, stream_options={"include_usage": include_usage})
    parts = chunks(streamed.text)
    read = [checked(ChatCompletionChunk, one) for one in parts]
    assert {(one.id, one.object, one.model) for one in read} == {(read[0].id, "chat.completion.chunk", "weak")}
    choices = [one.choices[0] for one in read if one.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole["choices"][0]["message"]["content"]
    assert [choice.delta.role for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert [choice.finish_reason for choice in choices] == [*[None] * (len(choices) - 1), "stop"]
    assert parts[-1]["stitch"]["route"] == "weak"
    assert not any("stitch" in one for one in parts[:-1])
    if include_usage:
        assert parts[-1]["choices"] == []
        assert parts[-1]["usage"] == whole["usage"]
        assert [one["usage"] for one in parts[:-1]] == [None] * (len(parts) - 1)
    else:
        assert not any("usage" in one for one in parts)


async def test_openais_async_client_streams(serve: Serve) -> None:
    async with serve(*shards()) as served:
        stream = await served.client.chat.completions.create(model="strong", messages=USER, stream=True)
        read = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read) == TEXT
    assert read[-1].choices[0].finish_reason == "stop"


async def test_openais_sync_client_asks_and_streams(serve: Serve) -> None:
    def ask(url: str) -> tuple[str | None, str]:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            create: Any = client.chat.completions.create
            reply = create(model="weak", messages=USER)
            with create(model="weak", messages=USER, stream=True) as stream:
                parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        return reply.choices[0].message.content, "".join(parts)

    async with serve(*shards()) as served:
        assert await asyncio.to_thread(ask, served.url) == (TEXT, TEXT)


async def test_stop_and_max_tokens_end_the_answer(serve: Serve) -> None:
    async with serve(*shards()) as served:
        stopped = (await served.chat(stop="lo w")).json()["choices"][0]
        limited = (await served.chat(max_completion_tokens=1)).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("hel", "stop")
    assert limited["finish_reason"] == "length"
    assert TEXT.startswith(limited["message"]["content"])


@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_have_a_choice_each(serve: Serve, stream: bool) -> None:
    async with serve(*shards()) as served:
        response = await served.chat(n=3, stream=stream, stream_options={"include_usage": True} if stream else None)
    if not stream:
        reply = checked(ChatCompletion, response.json())
        assert [(one.index, one.message.content) for one in reply.choices] == [(index, TEXT) for index in range(3)]
        usage = response.json()["usage"]
    else:
        parts = chunks(response.text)
        choices = [checked(ChatCompletionChunk, one).choices[0] for one in parts[:-1]]
        for index in range(3):
            own = [choice for choice in choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in own) == TEXT
            assert [choice.delta.role for choice in own if choice.delta.role] == ["assistant"]
            assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
        usage = parts[-1]["usage"]
    assert usage["completion_tokens"] == 3 * GENERATED


def tool_deltas() -> Iterator[inference_pb2.Delta]:
    for index, name in enumerate(("weather", "time")):
        yield inference_pb2.Delta(tool_calls=[inference_pb2.ToolCallDelta(index=index, id=f"call-{index}", name=name)])
        for part in ('{"city": ', '"Rome"}'):
            yield inference_pb2.Delta(tool_calls=[inference_pb2.ToolCallDelta(index=index, arguments=part)])


def test_parts_of_tool_calls_put_together_are_the_whole_calls() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    body = ChatBody.model_validate({"model": "weak", "messages": USER, "stream": True, "tools": tools})
    streaming, whole = ChatShape("an id", body), ChatShape("an id", body)
    finished = inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_TOOL_CALLS)
    read = []
    for shape in (streaming, whole):
        shape.start(inference_pb2.Started())
        for delta in tool_deltas():
            response = inference_pb2.GenerateResponse(delta=delta)
            if shape is whole:
                shape.add(response)
            else:
                read.append(streaming.events(response))
        shape.finish(0, finished)
    read.append(streaming.events(inference_pb2.GenerateResponse(finished=finished)))
    parts = [checked(ChatCompletionChunk, one).choices[0] for one in chunks(b"".join([*read, DONE]).decode())]
    calls: dict[int, list[str]] = {}
    for call in (call for part in parts for call in part.delta.tool_calls or ()):
        assert call.function is not None
        known = calls.setdefault(call.index, [call.id or "", call.function.name or "", ""])
        known[2] += call.function.arguments or ""
    reply = checked(ChatCompletion, whole.whole()).choices[0]
    found = [one.model_dump() for one in reply.message.tool_calls or ()]
    assert [[one["id"], one["function"]["name"], one["function"]["arguments"]] for one in found] == list(calls.values())
    assert (reply.message.content, reply.finish_reason, parts[-1].finish_reason) == (None, "tool_calls", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_one_entry_for_each_token(serve: Serve, stream: bool) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    async with serve(bottom, top) as served:
        response = await served.chat(logprobs=True, top_logprobs=2, stream=stream)
        without = (await served.chat()).json()["choices"][0]["logprobs"]
    if stream:
        found = [checked(ChatCompletionChunk, one).choices[0].logprobs for one in chunks(response.text)]
    else:
        found = [checked(ChatCompletion, response.json()).choices[0].logprobs]  # type: ignore[list-item]
    entries = [entry for one in found if one is not None for entry in one.content or ()]
    assert [entry.logprob for entry in entries] == [-0.5] * GENERATED
    assert without is None


async def test_first_event_leaves_before_the_second_token_exists(serve: Serve) -> None:
    bottom, top = shards()
    bottom.script_waits = asyncio.Event()
    async with serve(bottom, top) as served:
        fields = {"model": "weak", "messages": USER, "stream": True}
        async with served.raw.stream("POST", "/v1/chat/completions", json=fields) as response:
            assert response.headers["x-stitch-route"] == "weak"
            read = response.aiter_text()
            (first,) = events(await anext(read))
            assert '"content": "' in first or '"content":"' in first
            assert not bottom.script_waits.is_set()
            bottom.script_waits.set()
            rest = "".join([part async for part in read])
    assert events(rest)[-1] == "[DONE]"


async def test_waiting_stream_gets_its_head_and_comments(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_gateway.http.calls.COMMENT_SECONDS", 0.02)
    bottom, top = shards()
    hold = asyncio.Event()
    bottom.faults[0] = waits_for(hold)
    async with serve(bottom, top) as served:
        fields = {"model": "weak", "messages": USER, "stream": True}
        async with served.raw.stream("POST", "/v1/chat/completions", json=fields) as response:
            read = response.aiter_text()
            assert (await anext(read)).startswith(": ")
            hold.set()
            text = "".join([part async for part in read])
        parts = await served.client.chat.completions.create(model="weak", messages=USER, stream=True)
        assert "".join([part.choices[0].delta.content or "" async for part in parts]) == TEXT
    assert len(chunks(text)) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("token", [0, 1])
async def test_client_that_goes_away_cancels_its_session(serve: Serve, stream: bool, token: int) -> None:
    bottom, top = shards()
    bottom.faults[token] = waits_for(asyncio.Event())
    async with serve(bottom, top) as served:
        asking = asyncio.create_task(served.chat(stream=stream))
        await eventually(lambda: not bottom.faults)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: bottom.cancelled == 1 and bottom.running == 0)
        await eventually(lambda: served.reached.metric("stitch_cancelled_total", cause="client") == 1)
        assert served.reached.metric("stitch_requests_running") == 0


async def test_error_after_the_first_event_is_an_event_without_done(serve: Serve) -> None:
    bottom, top = shards()
    bottom.faults[1] = raises(Expired("too late"))
    async with serve(bottom, top) as served:
        response = await served.chat(stream=True)
        bottom.faults[1] = raises(Expired("too late"))
        with pytest.raises(openai.APIError, match="too late"):
            async for _ in await served.client.chat.completions.create(model="weak", messages=USER, stream=True):
                pass
    assert response.status_code == 200
    *_, last = events(response.text)
    assert '"code": "deadline_exceeded"' in last


@pytest.mark.parametrize("stream", [False, True])
async def test_error_before_the_first_event_has_a_status(serve: Serve, stream: bool) -> None:
    bottom, top = shards()
    bottom.faults[0] = raises(Exhausted("no room", retry_after_seconds=2.5))
    async with serve(bottom, top) as served:
        response = await served.chat(stream=stream)
    assert response.status_code == 429
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


async def test_each_class_of_openais_errors_is_raised(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[tenants.t]\nkeys = ["{hash_key("mine")}"]\nroutes = ["weak"]\n')
    bottom, top = shards()
    async with serve(bottom, top, key="mine", keys=str(tmp_path / "keys.toml")) as served:
        create = served.client.chat.completions.create

        async def asked(model: str = "weak", **fields: Any) -> openai.APIStatusError:
            with pytest.raises(openai.APIStatusError) as caught:
                await create(model=model, messages=USER, **fields)
            return caught.value

        found = {
            "BadRequestError": await asked(temperature=-1),
            "AuthenticationError": await asked(extra_headers={"authorization": "Bearer other"}),
            "PermissionDeniedError": await asked("strong"),
            "NotFoundError": await asked("none"),
            "UnprocessableEntityError": await asked(extra_body={"objectives": {"max_cost": 1e-9}}),
        }
        bottom.faults[0] = raises(Exhausted("no room"))
        found["RateLimitError"] = await asked()
        served.gateway.in_flight.close()
        found["InternalServerError"] = await asked()
    assert {name: type(error).__name__ for name, error in found.items()} == {name: name for name in found}
    assert found["BadRequestError"].param == "temperature"
    assert "temperature is -1.0, but it must be at least 0 and at most 100" in str(found["BadRequestError"])
    assert found["NotFoundError"].code == "model_not_found"
    assert found["InternalServerError"].status_code == 503
    assert found["InternalServerError"].response.headers["retry-after"] == "1"


async def test_lost_shard_without_replica_is_unavailable(serve: Serve) -> None:
    bottom, top = shards()
    bottom.faults[0] = raises(Unavailable("gone"))
    async with serve(bottom, top) as served:
        await top.stop()
        await eventually(lambda: not served.gateway.health.serving)
        response = await served.chat()
        assert (await served.raw.get("/ready")).status_code == 503
        assert (await served.raw.get("/health")).status_code == 200
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"


async def test_deadline_of_a_header_expires(serve: Serve) -> None:
    bottom, top = shards()
    bottom.faults[0] = waits_for(asyncio.Event())
    async with serve(bottom, top) as served:
        headers = {"x-stitch-deadline-seconds": "0.2"}
        response = await served.raw.post(
            "/v1/chat/completions", json={"model": "weak", "messages": USER}, headers=headers
        )
        refused = [
            await served.raw.get("/v1/models", headers={"x-stitch-deadline-seconds": given})
            for given in ("soon", "0", "1e300", "inf")
        ]
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert [reply.json()["error"]["param"] for reply in refused] == ["x-stitch-deadline-seconds"] * 4


async def test_models_are_the_routes_and_auto(serve: Serve) -> None:
    async with serve(*shards()) as served:
        listed = (await served.raw.get("/v1/models")).json()
        found = await served.client.models.retrieve("weak")
        with pytest.raises(openai.NotFoundError):
            await served.client.models.retrieve("none")
    assert [checked(Model, one).id for one in listed["data"]] == ["auto", "weak", "strong"]
    assert found.id == "weak"


async def test_client_names_its_request(serve: Serve) -> None:
    async with serve(*shards()) as served:
        named = await served.raw.get("/v1/models", headers={"x-request-id": "mine"})
        refused = await served.raw.get("/v1/models", headers={"x-request-id": "a" * 129})
    assert named.headers["x-request-id"] == "mine"
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")


async def test_drain_lets_streams_end_and_refuses_new_ones(serve: Serve) -> None:
    bottom, top = shards()
    bottom.script_waits = asyncio.Event()
    async with serve(bottom, top) as served:
        asking = asyncio.create_task(served.chat(stream=True))
        await eventually(lambda: bottom.running == 1)
        draining = asyncio.create_task(served.gateway.drain(seconds=60))
        await eventually(lambda: served.gateway.in_flight.closed)
        refused = await served.chat()
        ready = await served.raw.get("/ready")
        bottom.script_waits.set()
        streamed = await asking
        await draining
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert ready.status_code == 503
    assert len(chunks(streamed.text)) > 1


async def test_stop_ends_streams_with_an_error(serve: Serve) -> None:
    bottom, top = shards()
    bottom.faults[1] = waits_for(asyncio.Event())
    async with serve(bottom, top) as served:
        fields = {"model": "weak", "messages": USER, "stream": True}
        async with served.raw.stream("POST", "/v1/chat/completions", json=fields) as response:
            read = response.aiter_text()
            # Its head has come.
            text = await anext(read)
            await served.gateway.stop()
            text += "".join([part async for part in read])
        *_, last = events(text)
        await eventually(lambda: bottom.cancelled == 1)
        assert served.reached.metric("stitch_cancelled_total", cause="shutdown") == 1
    assert '"code": "shutting_down"' in last


async def test_unknown_paths_and_methods_have_openais_errors(serve: Serve) -> None:
    async with serve(*shards()) as served:
        replies = [await served.raw.get(path) for path in ("/v1/none", "/v1/chat/completions")]
    assert [reply.status_code for reply in replies] == [404, 405]
    assert [reply.json()["error"]["code"] for reply in replies] == ["not_found", "method_not_allowed"]
