"""Answers of real models under JSON schemas, two to a request: all that end by themselves validate."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from openai.types.chat import ChatCompletion

from tests.support.json_schemas import SCHEMAS
from tests.support.openai_replies import checked
from tests.support.processes import Cluster

pytestmark = pytest.mark.slow

ANSWERS = 2
AT_A_TIME = 8


async def answered(url: str, asked: list[dict[str, Any]]) -> list[ChatCompletion]:
    """The replies to these requests, some of them at the same time."""
    limits = httpx2.Limits(max_connections=AT_A_TIME)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:
        replies = await asyncio.gather(*(client.post("/chat/completions", json=one) for one in asked))
    return [checked(ChatCompletion, reply.json()) for reply in replies]


@pytest.mark.parametrize(("schemas", "seeds"), [(SCHEMAS[::5], 1), pytest.param(SCHEMAS, 5, marks=pytest.mark.full)])
def test_answers_that_end_by_themselves_validate(
    tiny_cluster: Cluster, schemas: tuple[dict[str, Any], ...], seeds: int
) -> None:
    cases = [(schema, seed) for schema in schemas for seed in range(seeds)]
    asked = [
        {
            "model": "weak",
            "messages": [{"role": "user", "content": "stitch"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
            "temperature": 1,
            "seed": seed,
            "n": ANSWERS,
            "max_tokens": 100,
        }
        for schema, seed in cases
    ]
    replies = asyncio.run(answered(f"http://{tiny_cluster.http}/v1", asked))
    choices = [(schema, choice) for (schema, _), reply in zip(cases, replies, strict=True) for choice in reply.choices]
    assert len(choices) == ANSWERS * len(cases)
    ended = [(schema, choice.message.content) for schema, choice in choices if choice.finish_reason == "stop"]
    assert len(ended) >= 0.8 * len(choices)
    for schema, content in ended:
        assert content is not None
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(content)), (schema, content)
    # The answers to one request are drawn independently.
    assert any(one.message.content != other.message.content for reply in replies for one, other in [reply.choices])
