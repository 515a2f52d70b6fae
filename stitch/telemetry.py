"""Traces of requests, recorded by OpenTelemetry where a cluster asks for them and the extra `otel` is installed.

In: the W3C `traceparent` of a caller, and what happens to a request. Out: spans, sent over OTLP as the standard
`OTEL_*` variables say, and the `traceparent` for the next process. Invariant: without traces nothing of OpenTelemetry
is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeAlias

from stitch.errors import InvalidRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as RecordedSpan

# Names, sizes and durations; never text of a prompt or an answer.
Attributes: TypeAlias = Mapping[str, str | bool | int | float | Sequence[str]]
NONE: Attributes = {}


class Span:
    """A span that nobody records. Times are Unix times in nanoseconds; None: now."""

    # Of this span, for its children in other processes; empty where it is not recorded.
    traceparent = ""
    trace_id = ""

    def set(self, attributes: Attributes, name: str = "") -> None:
        """Adds attributes, and replaces the name where one is given."""

    def event(self, name: str, attributes: Attributes = NONE, at: int | None = None) -> None:
        """Adds something that happened at one time."""

    def end(self, error: str = "", at: int | None = None) -> None:
        """Ends the span; `error` is the short name of what went wrong, empty where nothing did."""


class Tracer:
    """Starts spans that nobody records."""

    def start(
        self,
        name: str,
        traceparent: str = "",
        attributes: Attributes = NONE,
        at: int | None = None,
        serves: bool = True,
    ) -> Span:
        """A span under the caller's `traceparent`; `serves`: whether it is for a call of another process."""
        return NO_SPAN


NO_SPAN, NO_TRACES = Span(), Tracer()


class RecordingTracer(Tracer):
    """Starts spans of an OpenTelemetry provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("stitch")
        self._propagator = TraceContextTextMapPropagator()

    def start(
        self,
        name: str,
        traceparent: str = "",
        attributes: Attributes = NONE,
        at: int | None = None,
        serves: bool = True,
    ) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = self._propagator.extract({"traceparent": traceparent}, Context())
        kind = SpanKind.SERVER if serves else SpanKind.INTERNAL
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=at)
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span, Context()))
        return _Recorded(span, carrier.get("traceparent", ""))


class _Recorded(Span):
    def __init__(self, span: RecordedSpan, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent
        # An exemplar or a log line names traces that somebody can look up.
        self.trace_id = f"{span.get_span_context().trace_id:032x}" if span.is_recording() else ""

    def set(self, attributes: Attributes, name: str = "") -> None:
        self._span.set_attributes(attributes)
        if name:
            self._span.update_name(name)

    def event(self, name: str, attributes: Attributes = NONE, at: int | None = None) -> None:
        self._span.add_event(name, attributes, at)

    def end(self, error: str = "", at: int | None = None) -> None:
        from opentelemetry.trace import StatusCode

        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(at)


@contextmanager
def tracing(wanted: bool, service: str, instance: str) -> Iterator[Tracer]:
    """A tracer for one process; the spans that are left are sent at the block's end.

    Raises InvalidRequest where traces are wanted and the extra is not installed.
    """
    if not wanted:
        yield NO_TRACES
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidRequest("traces", True, "they need the extra: pip install 'stitch-serving[otel]'") from error
    own = {"service.name": service, "service.instance.id": instance, "service.version": version("stitch-serving")}
    # The standard variables replace what the program says of itself.
    provider = TracerProvider(
        resource=Resource.create(own).merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield RecordingTracer(provider)
    finally:
        provider.shutdown()


def stage_attributes(stages: Mapping[str, float]) -> Attributes:
    """Seconds by stage of the time to first token, as attributes."""
    return {f"stitch.stage.{name}": seconds for name, seconds in stages.items()}


def unix_times(now: float) -> Callable[[float], int]:
    """Converts times of a clock that shows `now` now, in seconds, to Unix times in nanoseconds."""
    offset = time.time_ns() - round(now * 1e9)
    return lambda at: offset + round(at * 1e9)
