"""Links open with their first step, keep the order of frames, let urgent ones overtake, and report why they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from stitch.errors import Incompatible, StitchError, Unavailable
from stitch.sampling import Token
from stitch.v1 import shard_pb2
from stitch_server.engine.types import (
    KvRoom,
    LayerRange,
    LinkEvent,
    LinkLost,
    LinkReply,
    OutgoingStep,
    Segment,
    SessionToken,
    StepReply,
)
from stitch_server.rpc import link_client as links_module
from stitch_server.rpc.frames import reply_frame
from stitch_server.rpc.handshake import PROTOCOL_VERSION
from stitch_server.rpc.link_client import LinkClient
from stitch_server.rpc.silence import (
    ALONE_SECONDS,
    ASK_SECONDS,
    DOUBTED_SHARE,
    FIRST_SECONDS,
    IDLE_ASK_SECONDS,
    LEAST_SECONDS,
    OPENING_SECONDS,
    SLOW_BYTES_PER_SECOND,
)
from tests.support.engine_fakes import WIDTH, ManualClock, new_request
from tests.support.waiting import eventually
from tests.support.weightless_shard import new_identity

# What grpc reads after the last message; its stubs lack it.
BEAT = shard_pb2.LinkResponse(heartbeat=shard_pb2.Heartbeat())
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class FakeCall:
    """The calling end of one stream; a test provides the other end."""

    def __init__(self, welcome: object) -> None:
        self._welcome = welcome
        self.written: list[shard_pb2.LinkRequest] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._answers: asyncio.Queue[object] = asyncio.Queue()

    async def write(self, frame: shard_pb2.LinkRequest) -> None:
        await self.may_write.wait()
        self.written.append(frame)
        if frame.HasField("hello") and self._welcome is not None:
            self.say(self._welcome)

    async def read(self) -> object:
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def details(self) -> str:
        return "no reason"

    def say(self, answer: object) -> None:
        self._answers.put_nowait(answer)

    @property
    def steps(self) -> list[int]:
        return [frame.step.step for frame in self.written if frame.WhichOneof("frame") == "step"]

    @property
    def heartbeats(self) -> int:
        return sum(frame.HasField("heartbeat") for frame in self.written)

    @property
    def closed(self) -> list[int]:
        return [session for frame in self.written for session in frame.close.sessions]


def welcome_of(shard: str) -> shard_pb2.LinkResponse:
    return shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=new_identity(shard, "top")))


class LinkClientHarness:
    """A link client whose calls a test answers."""

    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.events: list[LinkEvent] = []
        self.sent_bytes: list[int] = []
        self.asked: list[str] = []
        # None: none comes.
        self.welcome: Any = welcome_of("top-0")
        identity = new_identity("bottom-0", "bottom")
        self.addresses = {"top-0": "127.0.0.1:1", "top-1": "127.0.0.1:2"}
        self.links = LinkClient(identity, self.events.append, self.sent_bytes.append, self.address_of)

    def address_of(self, neighbour: str) -> str:
        self.asked.append(neighbour)
        if neighbour not in self.addresses:
            raise Unavailable(f"shard {neighbour} is not in the cluster", shard=neighbour)
        return self.addresses[neighbour]

    def open_call(self, requests: None) -> FakeCall:
        self.calls.append(FakeCall(self.welcome))
        return self.calls[-1]

    def send(self, number: int, tokens: int = 1, urgent: bool = False, neighbour: str = "top-0") -> None:
        segment = Segment(new_request(), LayerRange(0, 1), 0, tokens, wants_token=True, blocks=[])
        rows = torch.zeros(tokens, WIDTH)
        self.links.send(neighbour, OutgoingStep(number, (segment,), (True,), rows, pipelined=False, urgent=urgent))

    async def connected(self) -> FakeCall:
        """A link that has sent its first step."""
        self.send(1)
        await eventually(lambda: self.calls and self.calls[-1].steps)
        return self.calls[-1]

    async def be_silent(self, seconds: float, neighbour: str = "top-0") -> None:
        """The next shard has sent nothing for that time, and the silence of the links has seen it."""
        link = self.links._links[neighbour]
        link.silent_seconds += seconds
        before = link.silent_seconds
        await eventually(lambda: link.silent_seconds > before or self.links.suspects)

    async def loss(self) -> StitchError:
        await eventually(lambda: self.losses)
        return self.losses[0].error

    @property
    def losses(self) -> list[LinkLost]:
        return [event for event in self.events if isinstance(event, LinkLost)]


class FakeChannel:
    """Connects to nothing."""

    def __init__(self, open_call: Callable[[None], FakeCall]) -> None:
        self._open_call = open_call

    def stream_stream(self, method: str, serialize: object, deserialize: object) -> Callable[[None], FakeCall]:
        assert method == "/stitch.v1.Shard/Link"
        return self._open_call

    async def __aenter__(self) -> FakeChannel:
        return self

    async def __aexit__(self, *reason: object) -> None:
        """Nothing was opened."""


@pytest.fixture
async def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    harness = LinkClientHarness()
    monkeypatch.setattr(links_module, "open_channel", lambda address: FakeChannel(harness.open_call))
    yield harness
    await harness.links.aclose()


async def test_link_to_a_shard_with_another_address_ends_and_the_next_one_goes_there(
    harness: LinkClientHarness,
) -> None:
    await harness.connected()
    harness.links.end_moved()
    assert harness.losses == []
    harness.addresses["top-0"] = "127.0.0.1:3"
    harness.links.end_moved()
    error = await harness.loss()
    assert isinstance(error, Unavailable)
    assert (error.shard, str(error)) == ("top-0", "top-0 has another address")
    harness.send(2)
    await eventually(lambda: len(harness.calls) == 2 and harness.calls[-1].steps)


async def test_link_to_a_shard_that_left_the_cluster_goes_on(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    del harness.addresses["top-0"]
    harness.links.end_moved()
    harness.send(2)
    await eventually(lambda: call.steps == [1, 2])
    assert harness.losses == []


async def test_first_step_opens_link(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    hello = call.written[0].hello
    assert (hello.identity.shard, hello.caller, hello.protocol_version) == ("bottom-0", "top-0", PROTOCOL_VERSION)
    assert call.steps == [1]
    assert harness.sent_bytes == [WIDTH * 4]


async def test_steps_to_one_shard_share_link(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    harness.welcome = welcome_of("top-1")
    harness.send(2)
    harness.send(3, neighbour="top-1")
    await eventually(lambda: call.steps == [1, 2] and len(harness.calls) == 2)
    await eventually(lambda: harness.calls[1].steps == [3])


async def test_reply_becomes_link_event(harness: LinkClientHarness) -> None:
    call, reply = await harness.connected(), StepReply(1, tokens=(SessionToken(5, 0, Token(7, 3)),))
    call.say(reply_frame(reply))
    await eventually(lambda: harness.events == [LinkReply("top-0", reply)])


async def test_kv_room_is_asked_for_and_becomes_link_event(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    harness.links.want("top-0", 40, ("top-1",))
    await eventually(lambda: call.written[-1].HasField("want"))
    assert call.written[-1].want == shard_pb2.KvWanted(tokens=40, chain=["top-1"])
    call.say(shard_pb2.LinkResponse(room=shard_pb2.KvRoom(tokens=40)))
    await eventually(lambda: harness.events == [KvRoom("top-0", 40)])


async def test_urgent_step_overtakes_queued_frames(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    call.may_write.clear()
    harness.send(2)
    harness.send(3)
    await eventually(lambda: harness.links._links["top-0"]._outbox.qsize() == 1)
    harness.send(4, urgent=True)
    await eventually(lambda: harness.links._links["top-0"]._outbox.qsize() == 2)
    call.may_write.set()
    await eventually(lambda: len(call.steps) == 4)
    assert call.steps == [1, 2, 4, 3]


async def test_close_follows_steps_of_session(harness: LinkClientHarness) -> None:
    call = await harness.connected()
    harness.send(2)
    harness.links.close("top-0", [5, 6])
    await eventually(lambda: call.closed == [5, 6])
    assert call.written[-2].step.step == 2


async def test_close_opens_no_link(harness: LinkClientHarness) -> None:
    harness.links.close("top-0", [5])
    call = await harness.connected()
    assert (len(harness.calls), call.closed) == (1, [])


def broken(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, None)


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (broken(grpc.StatusCode.UNAVAILABLE, "reset"), Unavailable, "top-0 is gone: UNAVAILABLE"),
        (broken(grpc.StatusCode.INTERNAL, "oops"), Unavailable, "top-0 is gone: INTERNAL"),
        (broken(grpc.StatusCode.FAILED_PRECONDITION, "another stitch"), Incompatible, "another stitch"),
        (END, Unavailable, "top-0 ended the link: no reason"),
        (KeyError("what"), Unavailable, "top-0 is cut off by a defect: 'what'"),
    ],
)
async def test_ended_link_reports_reason(
    harness: LinkClientHarness, end: object, kind: type[StitchError], said: str
) -> None:
    call = await harness.connected()
    call.say(end)
    error = await harness.loss()
    assert (type(error), str(error)) == (kind, said)
    assert harness.losses[0].neighbour == "top-0"


async def test_step_after_loss_opens_new_link(harness: LinkClientHarness) -> None:
    (await harness.connected()).say(END)
    await harness.loss()
    harness.send(9)
    await eventually(lambda: len(harness.calls) == 2 and harness.calls[1].steps == [9])


async def test_address_is_asked_at_every_connect(harness: LinkClientHarness) -> None:
    (await harness.connected()).say(END)
    await harness.loss()
    harness.send(2)
    harness.send(3)
    await eventually(lambda: len(harness.calls) == 2 and harness.calls[1].steps == [2, 3])
    assert harness.asked == ["top-0", "top-0"]


async def test_shard_that_left_the_cluster_is_unavailable(harness: LinkClientHarness) -> None:
    harness.send(1, neighbour="unix:/tmp/socket")
    error = await harness.loss()
    assert isinstance(error, Unavailable)
    assert (str(error), error.shard) == ("shard unix:/tmp/socket is not in the cluster", "unix:/tmp/socket")
    assert harness.calls == []


async def test_other_shard_at_the_address_is_refused(harness: LinkClientHarness) -> None:
    harness.welcome = welcome_of("top-1")
    harness.send(1)
    error = await harness.loss()
    assert isinstance(error, Unavailable)
    assert (str(error), error.shard) == ("top-0 is not at its address, where shard 'top-1' answers", "top-0")
    assert harness.calls[0].steps == []


async def test_receiver_with_other_identity_is_refused(harness: LinkClientHarness) -> None:
    harness.welcome.welcome.identity.tokenizer = "another"
    harness.send(1)
    error = await harness.loss()
    assert isinstance(error, Incompatible)
    assert "tokenizer of shard top-0 is another" in str(error)
    assert harness.calls[0].steps == []


@pytest.mark.parametrize("answer", [shard_pb2.LinkResponse(), reply_frame(StepReply(1))])
async def test_receiver_without_welcome_is_refused(harness: LinkClientHarness, answer: shard_pb2.LinkResponse) -> None:
    harness.welcome = answer
    harness.send(1)
    error = await harness.loss()
    assert isinstance(error, Incompatible)
    assert "top-0 answered the handshake with" in str(error)


async def test_silent_receiver_times_out(harness: LinkClientHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "HANDSHAKE_SECONDS", 0.0)
    unanswered: Callable[[FakeCall], Any] = lambda call: asyncio.Event().wait()  # noqa: E731
    monkeypatch.setattr(FakeCall, "read", unanswered)
    harness.send(1)
    assert str(await harness.loss()) == "top-0 did not answer in 0 s"


async def test_closed_client_reports_no_loss(harness: LinkClientHarness) -> None:
    await harness.connected()
    await harness.links.aclose()
    assert harness.losses == []


class TestSilence:
    """A next shard that sends nothing is suspect until a new link to it is welcomed."""

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(links_module, "TICK_SECONDS", 0.001)
        monkeypatch.setattr(links_module, "PROBE_SECONDS", 0.001)

    async def test_silent_next_shard_is_suspect_and_loses_its_link(self, harness: LinkClientHarness) -> None:
        await harness.connected()
        harness.welcome = BEAT
        await harness.be_silent(FIRST_SECONDS)
        error = await harness.loss()
        assert isinstance(error, Unavailable)
        assert error.shard == "top-0"
        assert str(error).startswith("top-0 has been silent for 2.0 s")
        assert harness.links.suspects == {"top-0"}

    async def test_next_shard_is_asked_for_heartbeat_while_a_step_waits(self, harness: LinkClientHarness) -> None:
        call = await harness.connected()
        link = harness.links._links["top-0"]
        link.count_silence(ASK_SECONDS)
        await eventually(lambda: call.heartbeats == 1)
        # One at a time.
        link.count_silence(ASK_SECONDS)
        call.say(BEAT)
        await eventually(lambda: link.silent_seconds < ASK_SECONDS)
        assert call.heartbeats == 1

    async def test_idle_link_is_silent_from_its_heartbeat_on(self, harness: LinkClientHarness) -> None:
        call = await harness.connected()
        call.say(reply_frame(StepReply(1)))
        await eventually(lambda: harness.events)
        link = harness.links._links["top-0"]
        link.count_silence(0.9 * IDLE_ASK_SECONDS)
        assert (call.heartbeats, link.silent_seconds) == (0, 0.0)
        await eventually(lambda: call.heartbeats == 1 and link.silent_seconds > 0)

    async def test_silent_next_shard_is_doubted_until_it_is_heard(self, harness: LinkClientHarness) -> None:
        call = await harness.connected()
        await harness.be_silent(FIRST_SECONDS * DOUBTED_SHARE)
        await eventually(lambda: harness.links.doubted == {"top-0"})
        assert (harness.events, harness.links.suspects) == ([], set())
        call.say(BEAT)
        await eventually(lambda: not harness.links.doubted)

    async def test_opening_that_takes_longer_than_others_is_doubted_and_then_suspect(
        self, harness: LinkClientHarness
    ) -> None:
        await harness.connected()
        harness.welcome = None
        harness.calls[0].say(END)
        await harness.loss()
        harness.send(2)
        await eventually(lambda: "top-0" in harness.links._links)
        await harness.be_silent(LEAST_SECONDS * DOUBTED_SHARE)
        await eventually(lambda: harness.links.doubted == {"top-0"})
        assert (len(harness.losses), harness.links.suspects) == (1, set())
        await harness.be_silent(LEAST_SECONDS * DOUBTED_SHARE)
        await eventually(lambda: harness.links.suspects == {"top-0"})
        assert len(harness.losses) == 2

    async def test_first_opening_is_not_doubted(self, harness: LinkClientHarness) -> None:
        harness.welcome = None
        harness.send(1)
        await eventually(lambda: "top-0" in harness.links._links)
        await harness.be_silent(0.9 * OPENING_SECONDS)
        assert (harness.links.doubted, harness.links.suspects) == (frozenset(), set())
        await harness.be_silent(0.2 * OPENING_SECONDS)
        await harness.loss()

    async def test_bytes_on_their_way_give_a_next_shard_time(self, harness: LinkClientHarness) -> None:
        await harness.connected()
        harness.links._links["top-0"].unheard_bytes = SLOW_BYTES_PER_SECOND
        await harness.be_silent(FIRST_SECONDS + 0.5)
        assert harness.links.suspects == set()
        await harness.be_silent(0.5)
        await harness.loss()

    async def test_heartbeat_ends_silence(self, harness: LinkClientHarness) -> None:
        call = await harness.connected()
        await harness.be_silent(FIRST_SECONDS / 2)
        call.say(BEAT)
        await eventually(lambda: harness.links._links["top-0"].silent_seconds < FIRST_SECONDS / 2)
        await harness.be_silent(FIRST_SECONDS / 2)
        assert (harness.events, harness.links.suspects) == ([], set())

    async def test_suspect_gets_no_step(self, harness: LinkClientHarness) -> None:
        await harness.connected()
        harness.welcome = BEAT
        await harness.be_silent(FIRST_SECONDS)
        await harness.loss()
        harness.send(2)
        await eventually(lambda: len(harness.losses) == 2)
        assert str(harness.losses[1].error) == "top-0 is suspect"

    async def test_welcome_of_new_link_ends_suspicion(self, harness: LinkClientHarness) -> None:
        old = await harness.connected()
        await harness.be_silent(FIRST_SECONDS)
        await eventually(lambda: not harness.links.suspects and "top-0" in harness.links._links)
        old.say(reply_frame(StepReply(1)))
        harness.send(2)
        await eventually(lambda: harness.calls[-1].steps == [2])
        assert harness.calls[-1] is not old
        # The reply came over a link that no longer counts.
        assert [type(event) for event in harness.events] == [LinkLost]

    async def test_next_shard_without_replica_is_waited_for_longer(self, harness: LinkClientHarness) -> None:
        harness.links._has_replica = lambda name: False
        await harness.connected()
        await harness.be_silent(FIRST_SECONDS)
        assert harness.links.suspects == set()
        await harness.be_silent(ALONE_SECONDS)
        await harness.loss()

    async def test_time_in_which_this_process_is_stopped_does_not_count(
        self, harness: LinkClientHarness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await harness.connected()
        clock = ManualClock()
        monkeypatch.setattr(links_module, "time", SimpleNamespace(monotonic=clock))
        link = harness.links._links["top-0"]
        clock.advance(60.0)
        await eventually(lambda: link.silent_seconds > 0)
        await asyncio.sleep(0.01)
        assert link.silent_seconds < 1.0
