"""Answers of real models over HTTP: the text that gRPC gives, and nothing left of requests that are cut."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import httpx2
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from stitch.client import Answer
from tests.support.openai_replies import checked, chunks
from tests.support.processes import GATEWAY, Cluster
from tests.support.vanishing_clients import holds_nothing
from tests.support.waiting import becomes_true

pytestmark = pytest.mark.slow

AT_A_TIME = 20
# The longest life of a client; an answer takes longer.
LIFE_SECONDS = 0.3
RELEASE_SECONDS = 1.0
# On a machine that does much else.
PATIENT_SECONDS = 20.0


def fields(content: str, **given: Any) -> dict[str, Any]:
    return {"model": "weak", "messages": [{"role": "user", "content": content}], **given}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7, "top_p": 0.9}])
def test_text_is_that_of_grpc(tiny_cluster: Cluster, sampling: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "stitch"}]
    expected = tiny_cluster.client.generate(messages=messages, route="weak", max_tokens=24, **sampling)
    with httpx2.Client(base_url=f"http://{tiny_cluster.http}/v1", timeout=60, trust_env=False) as client:
        asked = fields("stitch", max_tokens=24, logprobs=True, top_logprobs=3, **sampling)
        whole = checked(ChatCompletion, client.post("/chat/completions", json=asked).json())
        streamed = client.post("/chat/completions", json={**asked, "stream": True})
    parts = [checked(ChatCompletionChunk, one).choices[0] for one in chunks(streamed.text)]
    assert whole.choices[0].message.content == expected.text
    assert "".join(part.delta.content or "" for part in parts) == expected.text
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        expected.prompt_tokens,
        expected.generated_tokens,
    )
    assert whole.choices[0].logprobs is not None
    streamed_entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content or ()]
    assert streamed_entries == whole.choices[0].logprobs.content
    assert len(streamed_entries) == expected.generated_tokens


PROMPTS = [
    " ".join(
        Random(index).choices(("the", "fox", "Paris", "is", "wörld", "\N{WAVING HAND SIGN}", "7"), k=index % 9 + 1)
    )
    for index in range(50)
]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7}], ids=["greedy", "seeded"])
def test_fifty_prompts_have_the_text_of_grpc(tiny_cluster: Cluster, sampling: dict[str, Any]) -> None:
    given: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, **sampling}
    plain = [{"prompt": prompt, "route": "weak", **given} for prompt in PROMPTS]
    chats = [{"messages": fields(prompt)["messages"], "route": "weak", **given} for prompt in PROMPTS]
    expected = [one.text for one in tiny_cluster.client.batch([*plain, *chats]) if isinstance(one, Answer)]
    assert len(expected) == 100
    url = f"http://{tiny_cluster.http}/v1"
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        asked = {"model": "weak", "prompt": PROMPTS, **given}
        completed = checked(Completion, client.post("/completions", json=asked).json())
        parts = [one["choices"][0] for one in chunks(client.post("/completions", json={**asked, "stream": True}).text)]
    assert [choice.text for choice in completed.choices] == expected[:50]
    streamed = ["".join(part["text"] for part in parts if part["index"] == index) for index in range(50)]
    assert streamed == expected[:50]
    replies = asyncio.run(chatted(url, [fields(prompt, **given) for prompt in PROMPTS]))
    assert [reply.choices[0].message.content for reply in replies] == expected[50:]


async def chatted(url: str, asked: list[dict[str, Any]]) -> list[ChatCompletion]:
    async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        replies = await asyncio.gather(*(client.post("/chat/completions", json=one) for one in asked))
    return [checked(ChatCompletion, reply.json()) for reply in replies]


@pytest.mark.parametrize(
    ("requests", "limit_seconds"), [(40, PATIENT_SECONDS), pytest.param(200, RELEASE_SECONDS, marks=pytest.mark.full)]
)
def test_requests_that_are_cut_leave_nothing(tiny_cluster: Cluster, requests: int, limit_seconds: float) -> None:
    asyncio.run(cut_at_random(f"http://{tiny_cluster.http}/v1", AT_A_TIME, seed=1))
    assert becomes_true(lambda: holds_nothing(tiny_cluster), PATIENT_SECONDS)
    before = tasks(tiny_cluster)
    asyncio.run(cut_at_random(f"http://{tiny_cluster.http}/v1", requests, seed=2))
    assert becomes_true(lambda: holds_nothing(tiny_cluster), limit_seconds)
    assert becomes_true(lambda: tasks(tiny_cluster) <= before, limit_seconds)


def tasks(cluster: Cluster) -> float:
    return cluster.metric(GATEWAY, "stitch_event_loop_tasks")


async def cut_at_random(url: str, requests: int, seed: int) -> None:
    """Half of them stream, and all go away at a moment of their own."""
    draw, room = Random(seed), asyncio.Semaphore(AT_A_TIME)

    async def one(client: httpx2.AsyncClient, stream: bool, seconds: float, content: str) -> None:
        async with room:
            asked = fields(content, stream=stream, max_tokens=400, ignore_eos=True)
            asking = asyncio.create_task(client.post("/chat/completions", json=asked))
            await asyncio.wait([asking], timeout=seconds)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    limits = httpx2.Limits(max_connections=AT_A_TIME)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as client:
        draws = [
            (number % 2 == 0, draw.uniform(0, LIFE_SECONDS), "ab" * draw.choice((5, 50, 200)))
            for number in range(requests)
        ]
        await asyncio.gather(*(one(client, *given) for given in draws))
