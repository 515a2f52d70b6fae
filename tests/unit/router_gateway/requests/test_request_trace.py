"""Tests of a request's spans at the gateway: over a replay, for a refusal, and as exemplars."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from prometheus_client.openmetrics.exposition import generate_latest

from tests.support.fake_shard import FakeShard, aborts
from tests.support.traces import TRACE_ID, Recorded, attributes, events, recorded, span_id
from tests.unit.router_gateway.conftest import Reach


@pytest.fixture
def spans() -> Iterator[Recorded]:
    with recorded() as recording:
        yield recording


def shards() -> tuple[FakeShard, FakeShard, FakeShard]:
    script = [104, 105, 106]
    return FakeShard("bottom-0", "bottom", script), FakeShard("bottom-1", "bottom", script), FakeShard("top-0", "top")


async def test_replay_is_an_event_and_both_chains_are_under_one_span(reach: Reach, spans: Recorded) -> None:
    first, second, top = shards()
    for bottom in first, second:
        bottom.faults[1] = aborts(grpc.StatusCode.UNAVAILABLE)
    async with reach(first, second, top, tracer=spans.tracer) as gateway:
        await gateway.generate(route="weak", request_id="a")
    request = spans.span("text_completion weak")
    replays = [replay for _, replay in events(request, "replay")]
    assert [replay["stitch.generated_tokens"] for replay in replays] == [1, 1][: len(replays)]
    sent = [one.traceparent for bottom in (first, second) for one in bottom.requests]
    assert len(sent) == len(replays) + 1 > 1
    assert {one.split("-")[2] for one in sent} == {span_id(request)}
    assert len(events(request, "first_token")) == 1
    assert attributes(request)["gen_ai.response.id"] == "a"


@pytest.mark.parametrize(("seed", "shown"), [(2**63 - 1, 2**63 - 1), (2**63, None), (2**64 - 1, None)])
async def test_every_seed_can_be_sent_over_otlp(
    reach: Reach, spans: Recorded, caplog: pytest.LogCaptureFixture, seed: int, shown: int | None
) -> None:
    first, _, top = shards()
    async with reach(first, top, tracer=spans.tracer) as gateway:
        await gateway.generate(route="weak", sampling={"seed": seed})
    request = spans.span("text_completion weak")
    assert attributes(request).get("gen_ai.request.seed") == shown
    encode_spans([request])
    assert not caplog.records


async def test_refused_request_has_a_span_with_its_outcome(reach: Reach, spans: Recorded) -> None:
    first, _, top = shards()
    async with reach(first, top, tracer=spans.tracer) as gateway:
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.generate(prompt="")
    (request,) = spans.spans
    assert attributes(request)["error.type"] == "invalid"


async def test_trace_id_is_an_exemplar_of_the_time_to_first_token(reach: Reach, spans: Recorded) -> None:
    first, _, top = shards()
    async with reach(first, top, tracer=spans.tracer) as gateway:
        await gateway.generate(route="weak")
        exposed = generate_latest(gateway.gateway.metrics.registry).decode()
    buckets = [line for line in exposed.splitlines() if line.startswith("stitch_time_to_first_token_seconds_bucket")]
    (exemplar,) = (line for line in buckets if " # " in line)
    assert f'{{trace_id="{spans.span("text_completion weak").context.trace_id:032x}"}}' in exemplar
    assert TRACE_ID not in exemplar
