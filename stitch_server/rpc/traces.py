"""The spans of a shard's sessions: built at the RPCs from what the engine reports, one for each session.

In: the sessions that a gateway or an upstream shard opens, and what is replied to them. Out: spans, and the
`traceparent` that goes on to the next shard. Prompt chunks and the first token are events; no token after it is one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from stitch.telemetry import NO_SPAN, Span, Tracer, stage_attributes, unix_times
from stitch.v1 import shard_pb2
from stitch_server.engine.request import Request
from stitch_server.engine.types import IncomingStep, Session


def start_span(tracer: Tracer, shard: str, session: Session) -> Span:
    """The span of a session, under that of the sender; the next shard's will be under this one."""
    attributes: dict[str, str | int] = {
        "stitch.shard": shard,
        "stitch.prompt_tokens": session.prompt_tokens,
        "stitch.replayed_tokens": len(session.token_ids) - session.prompt_tokens,
    }
    span = tracer.start(f"session {shard}", session.traceparent, attributes)
    session.traceparent = span.traceparent
    return span


def record_first_token(span: Span, request: Request, stages: dict[str, float]) -> None:
    """The first token of a request has come, `stages` after its arrival."""
    at = unix_times(time.perf_counter())
    span.event("queued", at=at(request.arrived_at))
    if request.first_scheduled_at is not None:
        span.event("scheduled", at=at(request.first_scheduled_at))
    for chunk in request.chunks:
        where = {"stitch.position": chunk.position, "stitch.tokens": chunk.length}
        span.event("prefill_chunk", where, at(chunk.sent_at))
    attributes = {"stitch.cached_tokens": request.reused, **stage_attributes(stages)}
    span.event("first_token", attributes, at(request.first_token_at or request.arrived_at))
    span.set({"stitch.route": request.route})


@dataclass(slots=True)
class _Traced:
    span: Span
    awaits_token: bool = True


class LinkTraces:
    """The spans of the sessions that one link has opened; without a recording tracer it does nothing."""

    def __init__(self, tracer: Tracer, shard: str) -> None:
        self._tracer = tracer
        self._shard = shard
        # By session id.
        self._sessions: dict[int, _Traced] = {}
        # By step: the position and the length of each chunk of a session whose first token has not come.
        self._chunks: dict[int, list[tuple[int, int, int]]] = {}

    def open(self, session_id: int, session: Session) -> None:
        """A step opens a session."""
        span = start_span(self._tracer, self._shard, session)
        if span is not NO_SPAN:
            span.set({"stitch.route": session.route})
            self._sessions[session_id] = _Traced(span)

    def receive(self, step: IncomingStep) -> None:
        """A step has come, after the sessions that it opens."""
        waiting = [one for one in step.segments if self._awaits_token(one.session_id)]
        if waiting:
            self._chunks[step.number] = [(one.session_id, one.position, one.length) for one in waiting]

    def reply(self, reply: shard_pb2.StepReply) -> None:
        """A step is answered."""
        chunks = self._chunks.pop(reply.step, ())
        if not chunks:
            return
        stages = stage_attributes({stage.name: stage.seconds for stage in reply.stages})
        sampled = {one.session for one in reply.tokens}
        for session_id, position, length in chunks:
            if (traced := self._sessions.get(session_id)) is None:
                continue
            traced.span.event("prefill_chunk", {"stitch.position": position, "stitch.tokens": length, **stages})
            if session_id in sampled:
                traced.awaits_token = False
                traced.span.event("first_token", stages)

    def close(self, session_ids: Iterable[int], error: str = "") -> None:
        """The sessions have ended."""
        for session_id in session_ids:
            if (traced := self._sessions.pop(session_id, None)) is not None:
                traced.span.end(error)

    def _awaits_token(self, session_id: int) -> bool:
        traced = self._sessions.get(session_id)
        return traced is not None and traced.awaits_token
