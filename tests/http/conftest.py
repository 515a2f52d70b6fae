"""Fixtures: a gateway in this process over fake shards, with OpenAI's client and a plain one of HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from router_gateway.server import Gateway
from tests.support.fake_shard import FakeShard
from tests.unit.router_gateway.conftest import Reach, Reached, _metrics_stop_at_once, reach

__all__ = ["_metrics_stop_at_once", "reach"]

USER = [{"role": "user", "content": "hello"}]


@dataclass
class Served:
    """A gateway with its clients."""

    reached: Reached
    client: Any
    raw: httpx2.AsyncClient

    @property
    def gateway(self) -> Gateway:
        return self.reached.gateway

    @property
    def url(self) -> str:
        return str(self.raw.base_url)

    async def chat(self, **fields: Any) -> httpx2.Response:
        """The reply to a chat of one word."""
        return await self.raw.post("/v1/chat/completions", json={"model": "weak", "messages": USER, **fields})


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(reach: Reach) -> Serve:
    """Opens a gateway with an HTTP port over these shards; `key` is the clients' own."""

    @asynccontextmanager
    async def opened(*shards: FakeShard, key: str = "none", **gateway: Any) -> AsyncIterator[Served]:
        async with reach(*shards, cluster={"http": "127.0.0.1:0", **gateway}) as reached:
            url = f"http://127.0.0.1:{reached.gateway.http_port}"
            headers = {"authorization": f"Bearer {key}"}
            async with (
                AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
                httpx2.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as raw,
            ):
                yield Served(reached, client, raw)

    return opened
