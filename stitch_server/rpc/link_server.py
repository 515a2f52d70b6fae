"""The receiving end of a link. Knows the relay by three calls, and nothing of what it computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from stitch.errors import Incompatible, InvalidRequest, StitchError
from stitch.v1 import shard_pb2
from stitch_server.engine.loop import Engine
from stitch_server.engine.next_stage import NextStage, ReceivedStep
from stitch_server.engine.types import StepReply
from stitch_server.rpc.frames import Assembly, reply_frame
from stitch_server.rpc.tensors import Packed

if TYPE_CHECKING:
    from torch import Tensor


class UpstreamLink:
    """One neighbour's stream: its steps go to the relay, the relay's replies go back."""

    def __init__(
        self,
        engine: Engine,
        relay: NextStage,
        assembly: Assembly,
        unpack: Callable[[Packed], Tensor],
        count_received: Callable[[int], None],
    ) -> None:
        self._engine = engine
        self._relay = relay
        self._assembly = assembly
        self._unpack = unpack
        self._count_received = count_received
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[shard_pb2.LinkResponse | StitchError | None] = asyncio.Queue()

    def reply(self, reply: StepReply) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, reply_frame(reply))

    async def responses(self, requests: AsyncIterator[shard_pb2.LinkRequest]) -> AsyncIterator[shard_pb2.LinkResponse]:
        """Everything that goes back, until the neighbour ends the stream or sends what can't be taken."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (response := await self._outbox.get()) is not None:
                if isinstance(response, StitchError):
                    raise response
                yield response
        finally:
            reader.cancel()
            self._engine.post(partial(self._relay.link_closed, self))

    async def _read(self, requests: AsyncIterator[shard_pb2.LinkRequest]) -> None:
        try:
            async for request in requests:
                self._take(request)
        except StitchError as error:
            self._outbox.put_nowait(error)
        else:
            self._outbox.put_nowait(None)

    def _take(self, request: shard_pb2.LinkRequest) -> None:
        kind = request.WhichOneof("frame")
        if kind == "step":
            self._receive(request.step)
        elif kind == "close":
            self._engine.post(partial(self._relay.close, self, list(request.close.sessions)))
        else:
            raise Incompatible(f"a frame of kind {kind or 'unknown'} came in the middle of a link")

    def _receive(self, frame: shard_pb2.Step) -> None:
        step = self._assembly.add(frame)
        if step is not None:
            self._count_received(len(step.rows.data))
            hidden = partial(self._unpack, step.rows)
            received = ReceivedStep(self, step.number, step.segments, hidden, step.pipelined)
            self._engine.post(partial(self._relay.receive, received))


async def decoded(requests: AsyncIterator[shard_pb2.LinkRequest]) -> AsyncIterator[shard_pb2.LinkRequest]:
    """The frames of a stream. Raises InvalidRequest for bytes that are none."""
    try:
        async for request in requests:
            yield request
    except DecodeError as error:
        raise InvalidRequest("frame", str(error), "it must be a stitch.v1.LinkRequest") from error
