"""LangChain's `ChatOpenAI` over a cluster: invoke, stream, structured output and tools, by chat and by responses."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, BaseMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.support.processes import Cluster

pytestmark = pytest.mark.slow

QUESTION = "stitch"
TOKENS = 24
# With the default paths of the API, and with those of responses.
APIS = pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])


class Weather(BaseModel):
    """How the weather is in a city."""

    # Else a model of random weights may write properties without end.
    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Paris"]
    degrees: int = Field(ge=-9, le=99)


def model(cluster: Cluster, responses: bool, **fields: Any) -> ChatOpenAI:
    url = f"http://{cluster.http}/v1"
    given = {"base_url": url, "api_key": "none", "max_retries": 0, "temperature": 0, **fields}
    return ChatOpenAI(model="weak", use_responses_api=responses, **given)


@APIS
def test_answer_is_that_of_grpc_whole_or_streamed(tiny_cluster: Cluster, responses: bool) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    expected = tiny_cluster.client.generate(messages=messages, route="weak", max_tokens=TOKENS)
    asked = model(tiny_cluster, responses, max_tokens=TOKENS, stream_usage=True)
    reply = asked.invoke(QUESTION)
    chunks: list[Any] = list(asked.stream(QUESTION))
    assert reply.text == expected.text
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert len(chunks) > 2
    assert reply.response_metadata["model_name"] == "weak"
    assert reply.usage_metadata is not None
    tokens = expected.prompt_tokens, expected.generated_tokens
    assert (reply.usage_metadata["input_tokens"], reply.usage_metadata["output_tokens"]) == tokens
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert isinstance(whole, BaseMessageChunk)
    assert whole.usage_metadata["output_tokens"] == expected.generated_tokens  # type: ignore[attr-defined]


@APIS
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_instance(tiny_cluster: Cluster, responses: bool, method: Any) -> None:
    asked = model(tiny_cluster, responses, temperature=1).with_structured_output(Weather, method=method)
    assert isinstance(asked.invoke(QUESTION), Weather)


@APIS
def test_bound_tool_is_called_and_its_result_goes_back(tiny_cluster: Cluster, responses: bool) -> None:
    asked = model(tiny_cluster, responses, max_tokens=100).bind_tools([Weather], tool_choice="any")
    reply = asked.invoke(QUESTION)
    assert isinstance(reply, AIMessage)
    [call, *_] = reply.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    streamed: Any = None
    for chunk in asked.stream(QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    assert [one["args"] for one in streamed.tool_calls] == [one["args"] for one in reply.tool_calls]
    results = [ToolMessage(json.dumps({"sun": True}), tool_call_id=one["id"]) for one in reply.tool_calls]
    after = model(tiny_cluster, responses, max_tokens=TOKENS).bind_tools([Weather], tool_choice="none")
    assert after.invoke([HumanMessage(QUESTION), reply, *results]).text
