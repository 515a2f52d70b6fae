"""Spans leave over OTLP at the end of a program at the latest, and traces need the extra that sends them."""

from __future__ import annotations

import sys

import pytest

from stitch.errors import InvalidRequest
from stitch.telemetry import NO_TRACES, tracing, unix_times
from tests.support.traces import CLIENT_ID, TRACE_ID, TRACEPARENT, collecting


def test_spans_are_sent_when_the_program_ends() -> None:
    with collecting() as collector:
        with tracing(True, "router-gateway", "a") as tracer:
            span = tracer.start("request", TRACEPARENT, {"n": 1})
            span.event("first_token")
            span.end("cancelled")
        assert collector.spans == [("request", TRACE_ID, CLIENT_ID)]


def test_span_that_the_client_does_not_sample_is_not_sent_and_passes_that_on() -> None:
    with collecting() as collector:
        with tracing(True, "router-gateway", "a") as tracer:
            span = tracer.start("request", f"00-{TRACE_ID}-{CLIENT_ID}-00")
            span.end()
        assert collector.spans == []
    assert span.traceparent.startswith(f"00-{TRACE_ID}-")
    assert span.traceparent.endswith("-00")
    assert span.trace_id == ""


def test_traces_without_the_extra_are_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidRequest, match=r"stitch-serving\[otel\]"), tracing(True, "router-gateway", "a"):
        pass


def test_without_traces_nothing_is_recorded() -> None:
    with tracing(False, "router-gateway", "a") as tracer:
        assert tracer is NO_TRACES
        assert tracer.start("request", TRACEPARENT).traceparent == ""


def test_times_of_a_clock_become_unix_times() -> None:
    at = unix_times(100.0)
    assert at(100.5) - at(100.0) == 500_000_000
