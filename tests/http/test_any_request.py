"""Requests that are drawn from /openapi.json, as it allows them and as it doesn't: none is answered with 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from router_gateway.http.errors import TABLE
from tests.http.conftest import Serve
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import FakeShard

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STATUSES = {200, 404, 405, 413, 415, *(row.status for row in TABLE.values())} - {500}


@pytest.mark.parametrize("cases", [200, pytest.param(2_000, marks=pytest.mark.full)])
async def test_no_request_is_answered_with_500(serve: Serve, cases: int) -> None:
    bottom, top = FakeShard("bottom-0", "bottom", tokens("hello world")), FakeShard("top-0", "top")
    bottom.logprob = -0.5
    async with serve(bottom, top) as served:
        described = (await served.raw.get("/openapi.json")).json()
        # Any other name is no model, and nothing else of the request would count.
        for schema in described["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"enum": ["auto", "auto@0.4", "weak"]}
        replies = await asyncio.to_thread(_call, described, served.url, cases)
    assert len(replies) >= cases
    # Bodies that are answered are among them.
    assert sum(status == 200 and path in GENERATING for path, status in replies) > cases / 100


def _call(described: dict[str, Any], url: str, cases: int) -> list[tuple[str, int]]:
    """The paths that were called, and the statuses of the replies."""
    replies: list[tuple[str, int]] = []
    operations = [found.ok() for found in schemathesis.openapi.from_dict(described).get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    drawn = [one.as_strategy(generation_mode=mode) for one in operations for mode in modes]

    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(drawn))
        def answered(case: schemathesis.Case) -> None:
            reply = case.call(base_url=url, session=session)
            replies.append((case.path, reply.status_code))
            assert reply.status_code in STATUSES, (case.path, case.body, reply.text)
            if reply.status_code != 200:
                assert json.loads(reply.content)["error"]["message"]

        answered()
    return replies
