"""Spans that a test reads: from memory in one process, or from a collector that real programs send them to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stitch.telemetry import RecordingTracer

# A client's span.
TRACE_ID, CLIENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_ID}-01"


class Recorded:
    """The spans that have ended, and a tracer that records them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = RecordingTracer(self.provider)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        """The only span with that name."""
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def parents(self) -> dict[str, str]:
        """The name of each span's parent by its name; of one without a parent here, the parent's id."""
        names = {span_id(span): span.name for span in self.spans}
        return {span.name: names.get(parent := parent_id(span), parent) for span in self.spans}


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Records spans within the block."""
    spans = Recorded()
    try:
        yield spans
    finally:
        spans.provider.shutdown()


def span_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def trace_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def parent_id(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    return dict(span.attributes or {})


def events(span: ReadableSpan, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    """The time in nanoseconds and the attributes of each event with that name."""
    return [(event.timestamp, dict(event.attributes or {})) for event in span.events if event.name == name]


class Collector(TraceServiceServicer):
    """Keeps the spans that programs send over OTLP: name, trace id and parent's id of each."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str]] = []

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        for scope in (scope for resource in request.resource_spans for scope in resource.scope_spans):
            for span in scope.spans:
                self.spans.append((span.name, span.trace_id.hex(), span.parent_span_id.hex()))
        return ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[Collector]:
    """Runs a collector, and names it in the environment of the programs that are started within the block."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
            environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
            yield collector
    finally:
        server.stop(None).wait()
