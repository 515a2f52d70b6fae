"""Links are opened when needed, keep their order, let decode steps pass, and say why they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from stitch.errors import Incompatible, StitchError, Unavailable
from stitch.v1 import shard_pb2, shard_pb2_grpc
from stitch_server.engine.types import LayerRange, OutgoingStep, Segment, SessionToken, StepReply, Token
from stitch_server.rpc import link_client as links_module
from stitch_server.rpc.frames import reply_frame
from stitch_server.rpc.link_client import Links
from tests.support.engine_fakes import WIDTH, new_session
from tests.support.shard_fakes import new_identity
from tests.support.waiting import eventually

# What grpc reads behind the last message; its stubs don't know it.
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class FakeCall:
    """The calling end of one stream, with the other end in a test's hands."""

    def __init__(self, welcome: shard_pb2.LinkResponse) -> None:
        self.written: list[shard_pb2.LinkRequest] = []
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._answers: asyncio.Queue[object] = asyncio.Queue()
        self._answers.put_nowait(welcome)

    async def write(self, frame: shard_pb2.LinkRequest) -> None:
        await self.may_write.wait()
        self.written.append(frame)

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
    def closed(self) -> list[int]:
        return [session for frame in self.written for session in frame.close.sessions]


class FakeFront:
    """Hears of replies and losses."""

    def __init__(self) -> None:
        self.replies: list[StepReply] = []
        self.losses: list[tuple[str, StitchError]] = []

    def replied(self, reply: StepReply) -> None:
        self.replies.append(reply)

    def lost(self, address: str, error: StitchError) -> None:
        self.losses.append((address, error))


class Bench:
    """Links whose calls a test answers."""

    def __init__(self) -> None:
        self.calls: list[FakeCall] = []
        self.front = FakeFront()
        self.sent_bytes: list[int] = []
        self.welcome = shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=new_identity("top-0", "top")))
        self.links = Links(self.sent_bytes.append, "float32")
        engine: Any = SimpleNamespace(post=lambda command: command())
        front: Any = self.front
        self.links.attach(new_identity("bottom-0", "bottom"), engine, front)

    def stub(self, channel: object) -> object:
        return SimpleNamespace(Link=self._open)

    def _open(self, requests: None) -> FakeCall:
        self.calls.append(FakeCall(self.welcome))
        return self.calls[-1]

    def send(self, number: int, tokens: int = 1, urgent: bool = False, address: str = "top:1") -> None:
        segment = Segment(new_session(), LayerRange(0, 1), 0, tokens, wants_token=True, blocks=[])
        rows = torch.zeros(tokens, WIDTH)
        self.links.send(address, OutgoingStep(number, (segment,), (True,), rows, pipelined=False, urgent=urgent))

    async def connected(self) -> FakeCall:
        """A link over which a first step went."""
        self.send(1)
        await eventually(lambda: self.calls and self.calls[-1].steps)
        return self.calls[-1]

    async def loss(self) -> StitchError:
        await eventually(lambda: self.front.losses)
        return self.front.losses[0][1]


class FakeChannel:
    """Connects to nothing."""

    async def __aenter__(self) -> FakeChannel:
        return self

    async def __aexit__(self, *reason: object) -> None:
        """Nothing was opened."""


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    bench = Bench()
    monkeypatch.setattr(links_module, "open_channel", lambda address: FakeChannel())
    monkeypatch.setattr(shard_pb2_grpc, "ShardStub", bench.stub)
    yield bench
    await bench.links.aclose()


async def test_the_first_step_opens_a_link(bench: Bench) -> None:
    call = await bench.connected()
    hello = call.written[0].hello
    assert (hello.identity.shard, hello.caller, hello.protocol_version) == ("bottom-0", "top:1", 1)
    assert call.steps == [1]
    assert bench.sent_bytes == [WIDTH * 4]


async def test_all_steps_to_one_address_share_it(bench: Bench) -> None:
    call = await bench.connected()
    bench.send(2)
    bench.send(3, address="top:2")
    await eventually(lambda: call.steps == [1, 2] and len(bench.calls) == 2)
    await eventually(lambda: bench.calls[1].steps == [3])


async def test_replies_reach_the_front(bench: Bench) -> None:
    call, reply = await bench.connected(), StepReply(1, tokens=(SessionToken(5, 0, Token(7, 3)),))
    call.say(reply_frame(reply))
    await eventually(lambda: bench.front.replies == [reply])


async def test_a_decode_step_passes_those_that_still_wait(bench: Bench) -> None:
    call = await bench.connected()
    call.may_write.clear()
    bench.send(2)
    bench.send(3)
    await eventually(lambda: bench.links._links["top:1"]._outbox.qsize() == 1)
    bench.send(4, urgent=True)
    await eventually(lambda: bench.links._links["top:1"]._outbox.qsize() == 2)
    call.may_write.set()
    await eventually(lambda: len(call.steps) == 4)
    assert call.steps == [1, 2, 4, 3]


async def test_the_end_of_a_session_comes_behind_its_steps(bench: Bench) -> None:
    call = await bench.connected()
    bench.send(2)
    bench.links.close("top:1", [5, 6])
    await eventually(lambda: call.closed == [5, 6])
    assert call.written[-2].step.step == 2


async def test_the_end_of_a_session_opens_no_link(bench: Bench) -> None:
    bench.links.close("top:1", [5])
    call = await bench.connected()
    assert (len(bench.calls), call.closed) == (1, [])


def broken(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, None)


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (broken(grpc.StatusCode.UNAVAILABLE, "reset"), Unavailable, "top:1 is gone: reset"),
        (broken(grpc.StatusCode.INTERNAL, "oops"), Unavailable, "top:1 is gone: oops"),
        (broken(grpc.StatusCode.FAILED_PRECONDITION, "another stitch"), Incompatible, "another stitch"),
        (END, Unavailable, "top:1 ended the link: no reason"),
        (KeyError("what"), Unavailable, "the link to top:1 broke: 'what'"),
    ],
)
async def test_a_link_that_ends_says_why(bench: Bench, end: object, kind: type[StitchError], said: str) -> None:
    call = await bench.connected()
    call.say(end)
    error = await bench.loss()
    assert (type(error), str(error)) == (kind, said)
    assert bench.front.losses[0][0] == "top:1"


async def test_after_a_loss_the_next_step_opens_another(bench: Bench) -> None:
    (await bench.connected()).say(END)
    await bench.loss()
    bench.send(9)
    await eventually(lambda: len(bench.calls) == 2 and bench.calls[1].steps == [9])


async def test_a_receiver_that_does_not_fit_is_refused(bench: Bench) -> None:
    bench.welcome.welcome.identity.tokenizer = "another"
    bench.send(1)
    error = await bench.loss()
    assert isinstance(error, Incompatible)
    assert "tokenizer of shard top-0 is another" in str(error)
    assert bench.calls[0].steps == []


@pytest.mark.parametrize("answer", [shard_pb2.LinkResponse(), reply_frame(StepReply(1))])
async def test_a_receiver_that_does_not_welcome_is_refused(bench: Bench, answer: shard_pb2.LinkResponse) -> None:
    bench.welcome = answer
    bench.send(1)
    error = await bench.loss()
    assert isinstance(error, Incompatible)
    assert "top:1 answered the handshake with" in str(error)


async def test_a_receiver_that_says_nothing_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "HANDSHAKE_SECONDS", 0.0)
    unanswered: Callable[[FakeCall], Any] = lambda call: asyncio.Event().wait()  # noqa: E731
    monkeypatch.setattr(FakeCall, "read", unanswered)
    bench.send(1)
    assert str(await bench.loss()) == "top:1 did not answer in 0 s"


async def test_links_that_are_ended_are_not_lost(bench: Bench) -> None:
    await bench.connected()
    await bench.links.aclose()
    assert bench.front.losses == []
