"""This shard's links to the next ones: opened when first needed, given up when broken. Knows no session."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial

import grpc

from stitch.channels import open_channel
from stitch.errors import Incompatible, OutOfStep, StitchError, Unavailable, from_rpc_error
from stitch.v1 import shard_pb2, shard_pb2_grpc
from stitch_server.engine.in_flight import BatchSource
from stitch_server.engine.loop import Engine
from stitch_server.engine.types import OutgoingStep
from stitch_server.rpc.frames import reply_of, step_frames
from stitch_server.rpc.handshake import PROTOCOL_VERSION, check_welcome
from stitch_server.rpc.tensors import pack

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
CountBytes = Callable[[int], None]


class Links:
    """One link an address; `send` and `close` are called in the engine's thread, all else in the event loop."""

    def __init__(
        self, count_sent: CountBytes, wire_dtype: str, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self._count_sent = count_sent
        self._wire_dtype = wire_dtype
        self._connect = partial(open_channel, credentials=credentials)
        self._links: dict[str, _Link] = {}
        self._loop = asyncio.get_running_loop()
        self._identity = shard_pb2.ShardIdentity()
        self._engine: Engine | None = None
        self._front: BatchSource | None = None

    def attach(self, identity: shard_pb2.ShardIdentity, engine: Engine, front: BatchSource) -> None:
        """Says who calls, and who hears of replies and losses. The engine is made with these links: it comes later."""
        self._identity, self._engine, self._front = identity, engine, front

    def send(self, address: str, step: OutgoingStep) -> None:
        rows = pack(step.hidden, self._wire_dtype)
        frames = list(step_frames(step, rows))
        self._count_sent(len(rows.data))
        self._loop.call_soon_threadsafe(self._put, address, frames, step.urgent)

    def close(self, address: str, numbers: Sequence[int]) -> None:
        frame = shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=numbers))
        self._loop.call_soon_threadsafe(self._put_if_open, address, frame)

    async def aclose(self) -> None:
        """Ends all links; the shards behind free what came over them."""
        for link in list(self._links.values()):
            await link.aclose()

    def _put(self, address: str, frames: Sequence[shard_pb2.LinkRequest], urgent: bool) -> None:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = _Link(address, self._connect, self._identity, self._replied, self._lost)
        for frame in frames:
            link.put(frame, urgent)

    def _put_if_open(self, address: str, frame: shard_pb2.LinkRequest) -> None:
        """What is at its end needs no new link: a session lives no longer than the link that it came over."""
        link = self._links.get(address)
        if link is not None:
            link.put(frame, urgent=False)

    def _replied(self, message: shard_pb2.StepReply) -> None:
        if self._engine is not None and self._front is not None:
            self._engine.post(partial(self._front.replied, reply_of(message)))

    def _lost(self, address: str, error: StitchError) -> None:
        log.warning("link to %s: %s", address, error)
        self._links.pop(address, None)
        if self._engine is not None and self._front is not None:
            self._engine.post(partial(self._front.lost, address, error))


class _Link:
    def __init__(
        self,
        address: str,
        connect: Callable[[str], grpc.aio.Channel],
        identity: shard_pb2.ShardIdentity,
        replied: Callable[[shard_pb2.StepReply], None],
        lost: Callable[[str, StitchError], None],
    ) -> None:
        self._address = address
        self._connect = connect
        self._identity = identity
        self._replied = replied
        self._lost = lost
        self._order = itertools.count()
        self._outbox: asyncio.PriorityQueue[tuple[int, int, shard_pb2.LinkRequest]] = asyncio.PriorityQueue()
        self._task = asyncio.create_task(self._run(), name=f"link to {address}")

    def put(self, frame: shard_pb2.LinkRequest, urgent: bool) -> None:
        self._outbox.put_nowait((0 if urgent else 1, next(self._order), frame))

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with self._connect(self._address) as channel:
                await self._talk(channel)
        except grpc.aio.AioRpcError as error:
            self._lost(self._address, self._as_loss(error))
        except TimeoutError:
            self._lost(self._address, Unavailable(f"{self._address} did not answer in {HANDSHAKE_SECONDS:g} s"))
        except StitchError as error:
            self._lost(self._address, error)
        except Exception as error:  # whatever it was, the sessions on this link must hear of its end
            log.exception("the link to %s broke", self._address)
            self._lost(self._address, Unavailable(f"the link to {self._address} broke: {error}"))

    async def _talk(self, channel: grpc.aio.Channel) -> None:
        stub: shard_pb2_grpc.ShardAsyncStub = shard_pb2_grpc.ShardStub(channel)
        call = stub.Link(None)
        hello = shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=self._identity, caller=self._address)
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await call.write(shard_pb2.LinkRequest(hello=hello))
            answer = await call.read()
        if not isinstance(answer, shard_pb2.LinkResponse) or answer.WhichOneof("frame") != "welcome":
            raise Incompatible(f"{self._address} answered the handshake with {answer!r:.80}")
        check_welcome(answer.welcome, self._identity)
        writer = asyncio.create_task(self._write(call))
        try:
            while isinstance(message := await call.read(), shard_pb2.LinkResponse):
                self._replied(message.reply)
        finally:
            writer.cancel()
        # The end of the stream without its reason, if it has none.
        raise Unavailable(f"{self._address} ended the link: {await call.details()}")

    async def _write(self, call: grpc.aio.StreamStreamCall[shard_pb2.LinkRequest, shard_pb2.LinkResponse]) -> None:
        while True:
            _, _, frame = await self._outbox.get()
            try:
                await call.write(frame)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The reader hears of the end, with its reason.
                return

    def _as_loss(self, error: grpc.aio.AioRpcError) -> StitchError:
        known = from_rpc_error(error)
        if isinstance(known, Incompatible | OutOfStep):
            return known
        return Unavailable(f"{self._address} is gone: {error.details()}")
