"""The receiving end of one link: frames of an upstream shard to the engine, replies of the engine back.

In: decoded frames, after the handshake. Out: steps and session ends as commands for the engine, in the order of the
frames; reply frames; and heartbeats when asked, unless the engine is stuck in a pass. Invariant: when the stream ends,
for whatever reason, all of its sessions are freed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from google.protobuf.message import DecodeError

from stitch.errors import Incompatible, InvalidRequest, OutOfStep, StitchError, Unavailable
from stitch.process import InFlightTracker
from stitch.telemetry import NO_TRACES
from stitch.v1 import shard_pb2
from stitch_server.engine.loop import Engine
from stitch_server.engine.next_stage import NextStage
from stitch_server.engine.types import IncomingSegment, StepReply
from stitch_server.rpc.frames import MAX_SEGMENTS, StepAssembler, reply_frame
from stitch_server.rpc.traces import LinkTraces

# Sessions of one link that its upstream shard has opened and not closed; it closes every one, also a refused one.
MAX_SESSIONS = 2 * MAX_SEGMENTS

_HEARTBEAT = shard_pb2.LinkResponse(heartbeat=shard_pb2.Heartbeat())


Meet = Callable[[Iterable[str]], Awaitable[None]]


async def _meet_nobody(names: Iterable[str]) -> None:
    """The names mean nothing."""


class UpstreamLink:
    """The stream of one upstream shard."""

    is_local = False

    def __init__(
        self,
        engine: Engine,
        next_stage: NextStage,
        assembler: StepAssembler,
        in_flight: InFlightTracker,
        routes: frozenset[str],
        prefix_scope: str = "",
        meet: Meet = _meet_nobody,
        traces: LinkTraces | None = None,
    ) -> None:
        """`in_flight` counts the sessions that are open over this link, for the drain to wait for them.

        `meet` is awaited with the names of the shards after this one before a session that has them is opened.
        """
        self._traces = traces or LinkTraces(NO_TRACES, "")
        self.routes = routes
        self.prefix_scope = prefix_scope
        self._engine = engine
        self._next_stage = next_stage
        self._assembler = assembler
        self._in_flight = in_flight
        self._meet = meet
        self._loop = asyncio.get_running_loop()
        # None ends the stream.
        self._outbox: asyncio.Queue[shard_pb2.LinkResponse | StitchError | None] = asyncio.Queue()
        # By session id: leaves the tracker when closed.
        self._sessions: dict[int, ExitStack] = {}

    def reply(self, reply: StepReply) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, reply_frame(reply))

    def grant(self, tokens: int) -> None:
        """Called in the engine's thread."""
        response = shard_pb2.LinkResponse(room=shard_pb2.KvRoom(tokens=tokens))
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, response)

    async def responses(self, requests: AsyncIterator[shard_pb2.LinkRequest]) -> AsyncIterator[shard_pb2.LinkResponse]:
        """Yields replies until the upstream shard ends the stream. Raises StitchError for an invalid frame."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._outbox.get()) is not None:
                if isinstance(response, StitchError):
                    raise response
                yield response
                # Sent: a peer that reads no replies fills its own window.
                self._assembler.answered(response.reply.step)
                self._traces.reply(response.reply)
        finally:
            reader.cancel()
            self._leave(list(self._sessions))
            self._engine.post(partial(self._next_stage.on_upstream_lost, self))

    async def _read(self, requests: AsyncIterator[shard_pb2.LinkRequest]) -> None:
        try:
            async for request in requests:
                await self._handle(request)
        except StitchError as error:
            self._outbox.put_nowait(error)
        else:
            self._outbox.put_nowait(None)

    async def _handle(self, request: shard_pb2.LinkRequest) -> None:
        kind = request.WhichOneof("frame")
        if kind == "step":
            step = self._assembler.add(request.step)
            if step is not None:
                opened = [one.new_session for one in step.segments if one.new_session is not None]
                await self._meet([name for session in opened for name in session.chain])
                self._enter(step.segments)
                self._traces.receive(step)
                self._engine.post(partial(self._next_stage.receive, self, step))
        elif kind == "close":
            # Others are not open over this link.
            if session_ids := [one for one in request.close.sessions if one in self._sessions]:
                self._leave(session_ids)
                self._engine.post(partial(self._next_stage.close, self, session_ids))
        elif kind == "want":
            wanted = request.want
            self._engine.post(partial(self._next_stage.want, self, wanted.tokens, tuple(wanted.chain)))
        elif kind == "heartbeat":
            # Replies that wait show as much; and a peer that reads none of them gets no more.
            if self._outbox.empty() and not self._engine.pass_age.is_overdue:
                self._outbox.put_nowait(_HEARTBEAT)
        else:
            raise Incompatible(f"a frame of kind {kind or 'unknown'} came in the middle of a link")

    def _enter(self, segments: Sequence[IncomingSegment]) -> None:
        """Counts the sessions that these segments open.

        An upstream shard closes every session that it has opened, also one that was refused, so the tracker is empty
        exactly when no session is open over any link. Sessions that come while it is closed are not in it: the
        engine refuses them, with a failure of this session alone. Raises OutOfStep beyond MAX_SESSIONS.
        """
        for segment in segments:
            if segment.new_session is not None and segment.session_id not in self._sessions:
                if len(self._sessions) >= MAX_SESSIONS:
                    raise OutOfStep(f"{MAX_SESSIONS} sessions are open over this link, which is the limit")
                self._traces.open(segment.session_id, segment.new_session)
                entered = self._sessions[segment.session_id] = ExitStack()
                with suppress(Unavailable):
                    entered.enter_context(self._in_flight.admit())

    def _leave(self, session_ids: Sequence[int]) -> None:
        self._traces.close(session_ids)
        for session_id in session_ids:
            if (entered := self._sessions.pop(session_id, None)) is not None:
                entered.close()


async def decoded(requests: AsyncIterator[shard_pb2.LinkRequest]) -> AsyncIterator[shard_pb2.LinkRequest]:
    """The frames of a stream. Raises InvalidRequest for bytes that are no frame."""
    try:
        async for request in requests:
            yield request
    except DecodeError as error:
        raise InvalidRequest("frame", str(error), "it must be a stitch.v1.LinkRequest") from error
