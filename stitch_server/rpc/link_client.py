"""This shard's links to the next shards: opened with the first step for a shard, dropped when they break or are silent.

In: steps and session ends from the engine's thread. Out: `LinkEvent`s, which `on_event` puts into the engine's inbox.
A next shard that is silent is doubted, and gets no new sessions until it is heard. One that is silent for too long is
suspect: its link is ended, so that nothing it may still send counts, and it gets no sessions until a new link is
welcomed. Invariant: after `send`, the engine receives the step's reply or the loss of its link.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress

import grpc
from google.protobuf.message import DecodeError

from stitch.channels import open_channel
from stitch.errors import Incompatible, OutOfStep, StitchError, Unavailable, from_rpc_error, has_details, shown
from stitch.v1 import shard_pb2
from stitch_server.engine.types import KvRoom, LinkEvent, LinkLost, LinkReply, OutgoingStep
from stitch_server.rpc.frames import reply_of, step_frames
from stitch_server.rpc.handshake import PROTOCOL_VERSION, check_welcome
from stitch_server.rpc.silence import (
    ALONE_SECONDS,
    ASK_SECONDS,
    DOUBTED_SHARE,
    IDLE_ASK_SECONDS,
    LEAST_SECONDS,
    OPENING_SECONDS,
    TICK_SECONDS,
    SilenceBound,
)
from stitch_server.rpc.tensors import pack

log = logging.getLogger(__name__)

METHOD = "/stitch.v1.Shard/Link"
HANDSHAKE_SECONDS = 10.0
# Between two attempts to open a link to a suspect.
PROBE_SECONDS = 0.5

LinkCall = grpc.aio.StreamStreamCall[shard_pb2.LinkRequest, shard_pb2.LinkResponse]


class LinkClient:
    """One link per next shard; `send` and `close` are called in the engine's thread, all else in the event loop."""

    def __init__(
        self,
        identity: shard_pb2.ShardIdentity,
        on_event: Callable[[LinkEvent], None],
        count_bytes: Callable[[int], None],
        address_of: Callable[[str], str],
        connect: Callable[[str, str], grpc.aio.Channel] | None = None,
        has_replica: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """`identity` is this shard's; `count_bytes` is called with the bytes of each step's hidden states.

        `address_of` gives a shard's address by its name; it is asked at every connect. `connect` opens a channel to a
        shard at its address; None: without TLS. `has_replica` says whether another shard can take the sessions of that
        one, which is then not waited for as long.
        """
        self._identity = identity
        self._on_event = on_event
        self._count_bytes = count_bytes
        self._address_of = address_of
        self._connect = connect or (lambda neighbour, address: open_channel(address))
        self._links: dict[str, _Link] = {}
        # Where the latest link to each shard went.
        self._addresses: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()
        self._has_replica = has_replica
        self._silence, self._opening = SilenceBound(), SilenceBound(OPENING_SECONDS, few=1)
        # Next shards that have been silent for too long.
        self.suspects: set[str] = set()
        # Others that are silent for now.
        self.doubted: Set[str] = frozenset()
        self._tasks = {self._loop.create_task(self._count_silence(), name="silence of the links")}

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        """Queues a step for the next shard of that name.

        Packs its hidden states here, in the engine's thread: on a GPU that waits for the pass.
        """
        packed = pack(step.hidden, self._identity.wire_dtype)
        frames = list(step_frames(step, packed))
        self._count_bytes(len(packed.data))
        self._loop.call_soon_threadsafe(self._put, neighbour, frames, step.urgent, len(packed.data))

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        """Ends sessions on the next shard of that name."""
        frame = shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=session_ids))
        self._loop.call_soon_threadsafe(self._put_if_open, neighbour, frame)

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        """Asks the next shard of that name for KV room."""
        frame = shard_pb2.LinkRequest(want=shard_pb2.KvWanted(tokens=tokens, chain=chain))
        self._loop.call_soon_threadsafe(self._put_if_open, neighbour, frame)

    async def aclose(self) -> None:
        """Ends all links; the next shards free the sessions of these links."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._links.values()):
            await link.aclose()

    def _put(self, neighbour: str, frames: Sequence[shard_pb2.LinkRequest], urgent: bool, size: int) -> None:
        link = self._links.get(neighbour)
        if link is None and neighbour in self.suspects:
            self._on_event(LinkLost(neighbour, Unavailable(f"{neighbour} is suspect", shard=neighbour)))
            return
        if link is None:
            link = self._links[neighbour] = self._open(neighbour)
        for frame in frames:
            link.put(frame, urgent)
        link.waiting_steps += 1
        link.unheard_bytes += size

    def _put_if_open(self, neighbour: str, frame: shard_pb2.LinkRequest) -> None:
        """Without a link nothing is to be closed: a session does not outlive the link that opened it."""
        link = self._links.get(neighbour)
        if link is not None:
            link.put(frame, urgent=False)

    def _channel(self, neighbour: str) -> grpc.aio.Channel:
        """A channel to the address that the shard has now. Raises Unavailable where the cluster has no such shard."""
        address = self._addresses[neighbour] = self._address_of(neighbour)
        return self._connect(neighbour, address)

    def end_moved(self) -> None:
        """Ends the links to shards that have another address now."""
        for link in list(self._links.values()):
            # One that has left the cluster keeps its link until its sessions have ended.
            with suppress(Unavailable):
                address = self._address_of(link.neighbour)
                if address != self._addresses.get(link.neighbour, address):
                    link.end()
                    self.on_lost(link, Unavailable(f"{link.neighbour} has another address", shard=link.neighbour))

    def _open(self, neighbour: str) -> _Link:
        return _Link(neighbour, self._channel, self._identity, self._on_event, self)

    def on_heard(self, silent_seconds: float) -> None:
        """A next shard has sent something after that time."""
        self._silence.learn(silent_seconds)

    def on_welcome(self, link: _Link) -> None:
        """A link is open; to a suspect it is the one that is used from now on."""
        if self._links.get(link.neighbour) is link:
            self._opening.learn(link.silent_seconds)
        if link.neighbour in self.suspects:
            log.warning("%s answers again", link.neighbour)
            self.suspects.discard(link.neighbour)
            self._links[link.neighbour] = link

    def on_lost(self, link: _Link, error: StitchError) -> None:
        """A link has ended; one that only tried a suspect had no sessions."""
        if self._links.get(link.neighbour) is link:
            log.warning("link to %s: %s", link.neighbour, error)
            del self._links[link.neighbour]
            self._on_event(LinkLost(link.neighbour, error))

    async def _count_silence(self) -> None:
        """Counts the silence of each link, without the time in which this process did not run."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            passed, before = min(now - before, 2 * TICK_SECONDS), now
            doubted = set[str]()
            for link in list(self._links.values()):
                link.count_silence(passed)
                if link.silent_seconds > DOUBTED_SHARE * LEAST_SECONDS and self._doubts(link):
                    doubted.add(link.neighbour)
            self.doubted = doubted

    def _doubts(self, link: _Link) -> bool:
        """Whether a next shard is doubted for its silence; one that has been silent for too long becomes suspect."""
        if not self._has_replica(link.neighbour):
            longest, doubtful = ALONE_SECONDS, ALONE_SECONDS
        elif not link.is_welcomed:
            longest = self._opening.seconds()
            doubtful = DOUBTED_SHARE * longest if self._opening.is_learned else longest
        else:
            longest = self._silence.seconds(link.unheard_bytes)
            doubtful = DOUBTED_SHARE * longest
        if link.silent_seconds > longest:
            self._suspect(link)
            return False
        return link.silent_seconds > doubtful

    def _suspect(self, link: _Link) -> None:
        """Ends a link with all that it holds, and tries to open another one."""
        neighbour, silent = link.neighbour, f"{link.neighbour} has been silent for {link.silent_seconds:.1f} s"
        log.warning("%s: it is suspect", silent)
        self.suspects.add(neighbour)
        del self._links[neighbour]
        link.end()
        self._on_event(LinkLost(neighbour, Unavailable(silent, shard=neighbour)))
        probe = self._loop.create_task(self._probe(neighbour), name=f"probe of {neighbour}")
        self._tasks.add(probe)
        probe.add_done_callback(self._tasks.discard)

    async def _probe(self, neighbour: str) -> None:
        """Opens one link after the other to a suspect, until one is welcomed."""
        while neighbour in self.suspects:
            link = self._open(neighbour)
            try:
                await link.settled.wait()
            except asyncio.CancelledError:
                link.end()
                raise
            await asyncio.sleep(PROBE_SECONDS)


class _Link:
    """One stream to a next shard, from its handshake to its end."""

    def __init__(
        self,
        neighbour: str,
        connect: Callable[[str], grpc.aio.Channel],
        identity: shard_pb2.ShardIdentity,
        on_event: Callable[[LinkEvent], None],
        owner: LinkClient,
    ) -> None:
        self.neighbour = neighbour
        # For how long the next shard has sent nothing while it owed an answer: a welcome, a reply or a heartbeat.
        self.silent_seconds = 0.0
        self.is_welcomed = False
        # Steps without a reply, and the bytes of hidden states that were sent since the next shard was heard.
        self.waiting_steps = 0
        self.unheard_bytes = 0
        # Set when the link is open, or has ended.
        self.settled = asyncio.Event()
        self._connect = connect
        self._identity = identity
        self._on_event = on_event
        self._owner = owner
        # Since the next shard was heard, whether or not it owed anything.
        self._quiet_seconds = 0.0
        # Whether it owes a heartbeat.
        self._asked = False
        self._order = itertools.count()
        # Urgent frames first; within each class in order.
        self._outbox: asyncio.PriorityQueue[tuple[int, int, shard_pb2.LinkRequest]] = asyncio.PriorityQueue()
        self._task = asyncio.create_task(self._run(), name=f"link to {neighbour}")

    def put(self, frame: shard_pb2.LinkRequest, urgent: bool) -> None:
        self._outbox.put_nowait((0 if urgent else 1, next(self._order), frame))

    def count_silence(self, seconds: float) -> None:
        """Called at a fixed interval with the time since the last call; asks for a heartbeat where one is due."""
        self._quiet_seconds += seconds
        if self._asked or self.waiting_steps or not self.is_welcomed:
            self.silent_seconds += seconds
        patience = ASK_SECONDS if self.waiting_steps else IDLE_ASK_SECONDS
        if self.is_welcomed and not self._asked and self._quiet_seconds >= patience:
            self._asked = True
            self.put(shard_pb2.LinkRequest(heartbeat=shard_pb2.Heartbeat()), urgent=True)

    def end(self) -> None:
        """Ends the link without a report of its loss."""
        self._task.cancel()

    async def aclose(self) -> None:
        self.end()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with self._connect(self.neighbour) as channel:
                await self._exchange(channel)
        except grpc.aio.AioRpcError as error:
            self._lose(self._as_loss(error))
        except TimeoutError:
            self._lose(self._unavailable(f"did not answer in {HANDSHAKE_SECONDS:g} s"))
        except StitchError as error:
            self._lose(error)
        except Exception as error:  # the sessions of this link must end, whatever broke it
            log.exception("the link to %s broke", self.neighbour)
            self._lose(self._unavailable(f"is cut off by a defect: {error}"))

    def _lose(self, error: StitchError) -> None:
        self.settled.set()
        self._owner.on_lost(self, error)

    async def _exchange(self, channel: grpc.aio.Channel) -> None:
        call: LinkCall = channel.stream_stream(METHOD, shard_pb2.LinkRequest.SerializeToString, _response)(None)
        hello = shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=self._identity, caller=self.neighbour)
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await call.write(shard_pb2.LinkRequest(hello=hello))
            answer = await call.read()
        if not isinstance(answer, shard_pb2.LinkResponse) or answer.WhichOneof("frame") != "welcome":
            raise Incompatible(f"{self.neighbour} answered the handshake with {answer!r:.80}")
        if (found := answer.welcome.identity.shard) != self.neighbour:
            raise self._unavailable(f"is not at its address, where shard {shown(found)} answers")
        check_welcome(answer.welcome, self._identity)
        self._welcome()
        writer = asyncio.create_task(self._write(call))
        try:
            while isinstance(message := await call.read(), shard_pb2.LinkResponse):
                self._hear()
                if (event := self._event(message)) is not None:
                    self._on_event(event)
        finally:
            writer.cancel()
        # A stream that ended with an error status raised it above.
        raise self._unavailable(f"ended the link: {await call.details()}")

    def _welcome(self) -> None:
        self.is_welcomed = True
        self.settled.set()
        self._owner.on_welcome(self)
        self.silent_seconds, self._quiet_seconds = 0.0, 0.0

    def _hear(self) -> None:
        if self.silent_seconds or self._asked:
            self._owner.on_heard(self.silent_seconds)
        self.silent_seconds, self._quiet_seconds, self.unheard_bytes, self._asked = 0.0, 0.0, 0, False

    def _event(self, message: shard_pb2.LinkResponse) -> LinkEvent | None:
        """What the engine is told of a message; nothing of a heartbeat. Raises Incompatible for another greeting."""
        match message.WhichOneof("frame"):
            case "reply":
                self.waiting_steps = max(0, self.waiting_steps - 1)
                return LinkReply(self.neighbour, reply_of(message.reply))
            case "room":
                return KvRoom(self.neighbour, message.room.tokens)
            case "heartbeat":
                return None
        raise Incompatible(f"{self.neighbour} sent no reply in the middle of a link")

    async def _write(self, call: LinkCall) -> None:
        while True:
            _, _, frame = await self._outbox.get()
            try:
                await call.write(frame)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The reader raises the reason.
                return

    def _as_loss(self, error: grpc.aio.AioRpcError) -> StitchError:
        known = from_rpc_error(error)
        if isinstance(known, Incompatible | OutOfStep):
            return known
        if has_details(error):
            return self._unavailable(f"is gone: {error.details()}")
        # gRPC's own words have the shard's address, which is nothing for a client.
        log.warning("link to %s: %s", self.neighbour, error.details())
        return self._unavailable(f"is gone: {error.code().name}")

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(f"{self.neighbour} {reason}", shard=self.neighbour)


def _response(data: bytes) -> shard_pb2.LinkResponse:
    """The frame in these bytes; for bytes that are none, one without content, which ends the link with a reason.

    The stub would log such bytes as a defect of this program.
    """
    try:
        return shard_pb2.LinkResponse.FromString(data)
    except DecodeError:
        return shard_pb2.LinkResponse()
