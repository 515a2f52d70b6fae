"""Completions, /tokenize and /detokenize over HTTP, by OpenAI's own client and types."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import httpx2
import openai
import pytest
from openai.types import Completion
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming

from router_gateway.http.completions import CompletionBody
from tests.http.conftest import USER, Serve, Served
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import CONTEXT_TOKENS, FakeShard
from tests.support.openai_replies import checked, chunks

TEXT = "hello world"
# The words of the text, and the token that ends it.
GENERATED = len(tokens(TEXT)) + 1
UNSUPPORTED = sorted({*get_type_hints(CompletionCreateParamsNonStreaming), "stream"} - set(CompletionBody.model_fields))


def shards(text: str = TEXT) -> tuple[FakeShard, FakeShard]:
    bottom = FakeShard("bottom-0", "bottom", tokens(text))
    bottom.logprob = -0.5
    return bottom, FakeShard("top-0", "top")


async def complete(served: Served, **fields: Any) -> httpx2.Response:
    return await served.raw.post("/v1/completions", json={"model": "weak", "prompt": "the", **fields})


def typed(content: dict[str, Any]) -> Completion:
    """A reply or a chunk as OpenAI's type, which lacks the nulls that OpenAI sends.

    They are those of a chunk before the last one, and of a prompt's first token.
    """
    filled = copy.deepcopy(content)
    for choice in filled["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] is not None:
            for name, value in ("token_logprobs", 0.0), ("top_logprobs", {}):
                choice["logprobs"][name] = [value if one is None else one for one in choice["logprobs"][name]]
    checked(Completion, filled)
    # As the client makes it.
    return Completion.construct(**content)


async def completed(served: Served, **fields: Any) -> Completion:
    """The reply; streamed, its chunks put together give the same choices and usage."""
    whole = typed((await complete(served, **fields)).json())
    asked = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    *parts, last = [typed(one) for one in chunks((await complete(served, **asked)).text)]
    assert last.choices == []
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine if one.finish_reason] == [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            entries = [entry for one in mine if one.logprobs is not None for entry in getattr(one.logprobs, name)]
            assert entries == (getattr(choice.logprobs, name) if choice.logprobs else [])
    return whole


async def test_reply_has_openais_fields_and_its_own(serve: Serve) -> None:
    async with serve(*shards()) as served:
        response = await complete(served, model="auto")
    reply = checked(Completion, response.json())
    assert (reply.object, reply.model, reply.id) == (
        "text_completion",
        "weak",
        f"cmpl-{response.headers['x-request-id']}",
    )
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (TEXT, "stop", None)
    assert reply.usage is not None
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (GENERATED, GENERATED + len(tokens("the")))
    assert response.json()["stitch"]["route"] == "weak"


async def test_openais_client_completes_and_streams(serve: Serve) -> None:
    async with serve(*shards()) as served:
        whole = await served.client.completions.create(model="weak", prompt="the", max_tokens=1)
        stream = await served.client.completions.create(model="weak", prompt="the", max_tokens=1, stream=True)
        text = "".join([part.choices[0].text async for part in stream])
        with pytest.raises(openai.NotFoundError):
            await served.client.completions.create(model="other", prompt="the")
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == "length"


async def test_default_number_of_tokens_is_openais(serve: Serve) -> None:
    bottom, top = shards()
    async with serve(bottom, top) as served:
        await complete(served)
    assert bottom.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize("prompt", ["the", tokens("the"), ["the"], [tokens("the")]], ids=str)
async def test_prompt_is_text_or_tokens_or_a_list_of_them(serve: Serve, prompt: object) -> None:
    bottom, top = shards()
    async with serve(bottom, top) as served:
        reply = await completed(served, prompt=prompt)
    assert [choice.text for choice in reply.choices] == [TEXT]
    assert {tuple(request.token_ids) for request in bottom.requests} == {tuple(tokens("the"))}


async def test_answers_to_one_prompt_are_consecutive_choices(serve: Serve) -> None:
    bottom, top = shards()
    bottom.cached_tokens = 3
    async with serve(bottom, top) as served:
        reply = await completed(served, prompt=["the", "hello there"], n=2, echo=True)
    assert [choice.text for choice in reply.choices] == [f"the{TEXT}"] * 2 + [f"hello there{TEXT}"] * 2
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(tokens("the")) + len(tokens("hello there"))
    assert reply.usage.completion_tokens == 4 * GENERATED
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2 * 3


@pytest.mark.parametrize("prompt", ["hello there", tokens("hello there")], ids=["text", "tokens"])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_with_logprobs_scores_the_prompt(serve: Serve, prompt: object, max_tokens: int) -> None:
    bottom, top = shards()
    async with serve(bottom, top) as served:
        reply = await completed(served, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0)
    ids = [*tokens("hello there"), *tokens(TEXT)[:max_tokens]]
    [choice] = reply.choices
    words = [bytes_of(one) for one in ids]
    assert choice.text == "".join(words)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == words
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * (len(ids) - 1)]
    assert choice.logprobs.top_logprobs == [None, *({word: -0.5} for word in words[1:])]
    assert choice.logprobs.text_offset == [len("".join(words[:index])) for index in range(len(ids))]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(tokens("hello there")), max_tokens)


def bytes_of(token_id: int) -> str:
    from tests.support.byte_tokenizer import byte_tokenizer

    return byte_tokenizer().decode([token_id])


async def test_loglikelihood_of_lm_eval_is_read_from_the_reply(serve: Serve) -> None:
    """As `LocalCompletionsAPI.parse_logprobs` reads it: of the continuation alone, without the generated token."""
    context, continuation = tokens("the quick"), tokens(" brown fox")
    async with serve(*shards()) as served:
        asked = {"prompt": [[*context, *continuation]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        [choice] = (await complete(served, **asked, seed=1234)).json()["choices"]
    found = choice["logprobs"]
    assert sum(found["token_logprobs"][len(context) : -1]) == -0.5 * len(continuation)
    tops = found["top_logprobs"][len(context) : -1]
    assert all(
        value == max(top.values()) for value, top in zip(found["token_logprobs"][len(context) : -1], tops, strict=True)
    )


async def test_token_of_a_part_of_a_character_is_named_by_its_bytes(serve: Serve) -> None:
    async with serve(*shards("\N{HEAVY BLACK HEART}!")) as served:
        [choice] = (await completed(served, logprobs=0)).choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[:4] == ["bytes:\\xe2", "bytes:\\x9d", "bytes:\\xa4", "!"]
    assert choice.logprobs.text_offset == [0, 0, 0, 1, 2]


async def test_every_unsupported_parameter_is_refused_by_name(serve: Serve) -> None:
    assert UNSUPPORTED == ["suffix"]
    refused: Mapping[str, tuple[dict[str, Any], str]] = {
        "suffix": ({"suffix": "x"}, "suffix"),
        "best_of": ({"best_of": 2}, "best_of"),
        "max_tokens": ({"max_tokens": 0}, "max_tokens"),
        "n": ({"n": 2, "echo": True, "logprobs": 0}, "n"),
        "presence_penalty": ({"presence_penalty": 1, "echo": True, "logprobs": 0}, "presence_penalty"),
        "logprobs": ({"logprobs": 21}, "logprobs"),
        "stream_options": ({"stream_options": {}}, "stream_options"),
        "no prompts": ({"prompt": []}, "prompt"),
        "no ids": ({"prompt": [[5], []]}, "prompt[1]"),
        "mixed": ({"prompt": [5, "x"]}, "prompt[1]"),
        "an id beyond the vocabulary": ({"prompt": [5, 400]}, "prompt[1]"),
        "too long": ({"prompt": [5] * CONTEXT_TOKENS}, "prompt"),
        "an empty prompt": ({"prompt": ""}, "prompt"),
    }
    async with serve(*shards()) as served:
        replies = {name: await complete(served, **fields) for name, (fields, _) in refused.items()}
    assert {name: reply.status_code for name, reply in replies.items()} == dict.fromkeys(refused, 400)
    found = {name: reply.json()["error"]["param"] for name, reply in replies.items()}
    assert found == {name: param for name, (_, param) in refused.items()}


async def test_prompt_that_fails_ends_the_others(serve: Serve) -> None:
    bottom, top = shards()
    async with serve(bottom, top) as served:
        reply = await complete(served, prompt=["the", "x" * 10_000])
    assert reply.status_code == 400
    assert bottom.running == 0


async def post(served: Served, path: str, **fields: object) -> tuple[int, dict[str, Any]]:
    reply = await served.raw.post(path, json=fields)
    return reply.status_code, json.loads(reply.content)


async def test_tokenize_and_detokenize_have_vllms_shapes(serve: Serve) -> None:
    ids: Sequence[int] = tokens(TEXT)
    async with serve(*shards()) as served:
        assert await post(served, "/tokenize", model="weak", prompt=TEXT, add_special_tokens=False) == (
            200,
            {"count": len(ids), "max_model_len": CONTEXT_TOKENS, "tokens": ids, "token_strs": None},
        )
        _, chat = await post(served, "/tokenize", messages=USER, return_token_strs=True, add_generation_prompt=True)
        assert chat["token_strs"][0] == "<|im_start|>"
        rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert await post(served, "/detokenize", model="auto", tokens=chat["tokens"]) == (200, {"prompt": rendered})


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
        ("/tokenize", {"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": USER, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "x" * 10_000}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 400]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1] * (CONTEXT_TOKENS + 1)}, "tokens"),
    ],
)
async def test_text_that_has_no_tokens_is_refused_by_parameter(
    serve: Serve, path: str, fields: dict[str, Any], param: str
) -> None:
    async with serve(*shards()) as served:
        status, reply = await post(served, path, **fields)
    assert (status, reply["error"]["param"]) == (400, param)
