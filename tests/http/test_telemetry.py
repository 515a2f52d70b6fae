"""Requests over HTTP are counted by path and status, and traced under their client's span."""

from __future__ import annotations

import httpx2

from tests.http.conftest import USER, Serve
from tests.support.fake_shard import FakeShard
from tests.support.traces import CLIENT_ID, TRACE_ID, TRACEPARENT, recorded, trace_id
from tests.unit.router_gateway.conftest import Reach


def shards() -> tuple[FakeShard, FakeShard]:
    return FakeShard("bottom-0", "bottom", [104, 105]), FakeShard("top-0", "top")


async def test_requests_are_counted_by_the_template_of_their_path_and_by_status(serve: Serve) -> None:
    async with serve(*shards()) as served:
        await served.chat()
        await served.chat(model="none")
        for path in ("/v1/models/weak", "/v1/models/none", "/nothing", "/nowhere"):
            await served.raw.get(path)
        family = served.gateway.metrics.http_requests
        counts = {
            (sample.labels["path"], sample.labels["code"]): sample.value
            for sample in next(iter(family.collect())).samples
            if sample.name.endswith("_total") and sample.value
        }
    assert counts.pop(("other", "404")) == 2
    assert counts.pop(("/v1/models/{id}", "200")) == 1
    assert counts.pop(("/v1/chat/completions", "200")) == 1
    assert {path for path, _ in counts} == {"/v1/models/{id}", "/v1/chat/completions"}
    assert all(code.startswith("4") for _, code in counts)


async def test_request_is_traced_under_the_span_of_its_client(reach: Reach) -> None:
    with recorded() as spans:
        async with reach(*shards(), cluster={"http": "127.0.0.1:0"}, tracer=spans.tracer) as reached:
            url = f"http://127.0.0.1:{reached.gateway.http_port}/v1/chat/completions"
            async with httpx2.AsyncClient(headers={"traceparent": TRACEPARENT}, timeout=60, trust_env=False) as client:
                await client.post(url, json={"model": "weak", "messages": USER})
    assert {trace_id(span) for span in spans.spans} == {TRACE_ID}
    assert spans.parents() == {"chat weak": CLIENT_ID, "route": "chat weak"}
