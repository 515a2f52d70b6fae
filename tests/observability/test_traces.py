"""One request is one tree of spans: from the client's, over the gateway's, to one for each shard."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from router_gateway.config import GatewaySettings
from router_gateway.server import open_gateway
from stitch import channels
from stitch.v1 import inference_pb2, inference_pb2_grpc
from tests.support.loopback_shards import open_shards
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.traces import (
    CLIENT_ID,
    TRACE_ID,
    TRACEPARENT,
    Recorded,
    attributes,
    events,
    recorded,
    span_id,
    trace_id,
)
from tests.support.waiting import eventually, until_serving

PROMPT, MAX_TOKENS = "a secret of the client " * 12, 5
SPANS = {"text_completion strong", "route", "session bottom-0", "session top-0"}


@dataclass
class Traced:
    """An answer and its spans."""

    text: str
    finished: inference_pb2.Finished
    recorded: Recorded


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return asyncio.run(traced_answer(write_tiny_cluster(tmp_path_factory.mktemp("pair"), kernels=False)))


async def traced_answer(cluster_file: Path) -> Traced:
    request = inference_pb2.GenerateRequest(
        prompt=PROMPT, route="strong", sampling=inference_pb2.Sampling(max_tokens=MAX_TOKENS, ignore_eos=True)
    )
    with recorded() as spans:
        async with open_shards(cluster_file, spans.tracer) as shards:
            settings = GatewaySettings(cluster=shards.cluster, metrics_port=0)
            async with (
                open_gateway(settings, tracer=spans.tracer) as gateway,
                channels.open_channel(f"127.0.0.1:{gateway.port}") as channel,
            ):
                await until_serving(channel)
                call = inference_pb2_grpc.InferenceStub(channel).Generate(
                    request, metadata=[("traceparent", TRACEPARENT)], timeout=60
                )
                answer = [response async for response in call]
                # The last shard ends its span when the close frame has come.
                await eventually(lambda: {span.name for span in spans.spans} == SPANS)
    return Traced("".join(response.delta.text for response in answer), answer[-1].finished, spans)


def test_request_is_one_tree_under_the_span_of_the_client(traced: Traced) -> None:
    spans = traced.recorded
    assert {trace_id(span) for span in spans.spans} == {TRACE_ID}
    assert len(spans.spans) == len(SPANS)
    assert spans.parents() == {
        "text_completion strong": CLIENT_ID,
        "route": "text_completion strong",
        "session bottom-0": "text_completion strong",
        "session top-0": "session bottom-0",
    }
    request, bottom, top = map(spans.span, ("text_completion strong", "session bottom-0", "session top-0"))
    named = attributes(request)
    assert named["gen_ai.response.model"] == "strong"
    assert named["gen_ai.usage.input_tokens"] == traced.finished.prompt_tokens
    assert named["gen_ai.usage.output_tokens"] == MAX_TOKENS
    assert named["gen_ai.response.finish_reasons"] == ("length",)
    for shard in bottom, top:
        chunks = [chunk for _, chunk in events(shard, "prefill_chunk")]
        assert len(chunks) > 1
        assert sum(chunk["stitch.tokens"] for chunk in chunks) == traced.finished.prompt_tokens
        # No event a token.
        assert len(events(shard, "first_token")) == 1
        assert len(shard.events) <= len(chunks) + 3


def test_spans_have_no_text_of_the_prompt_or_the_answer(traced: Traced) -> None:
    written = "".join(span.to_json() for span in traced.recorded.spans)
    assert "secret" not in written
    assert traced.text
    assert traced.text not in written


def test_times_of_spans_and_events_are_the_stages_of_the_reply(traced: Traced) -> None:
    spans = traced.recorded
    request, route, bottom, top = map(
        spans.span, ("text_completion strong", "route", "session bottom-0", "session top-0")
    )
    (queued, _), (scheduled, _), (token, _) = (
        events(bottom, name)[0] for name in ("queued", "scheduled", "first_token")
    )
    sent, _ = events(bottom, "prefill_chunk")[-1]
    _, on_top = events(top, "first_token")[0]
    _, placed = events(request, "placed")[0]
    assert route.start_time is not None
    assert route.end_time is not None
    away = sum(value for name, value in on_top.items() if name.startswith("stitch.stage."))
    measured = {
        "route": (route.end_time - route.start_time) / 1e9,
        "queue": placed["stitch.stage.queue"] + (scheduled - queued) / 1e9 + on_top["stitch.stage.queue"],
        "bottom_prefill": (sent - scheduled) / 1e9,
        # As in the reply: what the next shard did may have started before the last chunk was sent.
        "wire": max(0.0, (token - sent) / 1e9 - away),
        **{stage: on_top[f"stitch.stage.{stage}"] for stage in ("stitch", "top_prefill", "sample")},
    }
    replied = {stage.name: stage.seconds for stage in traced.finished.stages}
    # A microsecond is what is lost between seconds and nanoseconds.
    assert measured == pytest.approx(replied, rel=0.05, abs=1e-6)
    assert {f"stitch.stage.{name}": seconds for name, seconds in replied.items()} == events(request, "first_token")[0][
        1
    ]


def test_request_without_a_traceparent_begins_a_trace() -> None:
    with recorded() as spans:
        span = spans.tracer.start("a", "no traceparent")
        child = spans.tracer.start("b", span.traceparent)
        child.end()
        span.end()
    assert spans.parents() == {"a": "", "b": "a"}
    assert span.traceparent.startswith(f"00-{span.trace_id}-{span_id(spans.span('a'))}-")


def test_opentelemetry_is_not_imported_without_traces() -> None:
    check = (
        "import sys; import router_gateway.server, stitch_server.rpc.traces, stitch.telemetry as telemetry\n"
        "with telemetry.tracing(False, 'router-gateway', 'a') as tracer:\n"
        "    span = tracer.start('a', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01')\n"
        "    span.event('b'); span.set({'c': 1}); span.end('d')\n"
        "assert (span.traceparent, span.trace_id) == ('', '')\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
