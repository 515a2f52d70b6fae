"""The upstream end of a link to a shard, which a test drives frame by frame, also with frames that no shard sends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from stitch.channels import open_channel
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc

PROTOCOL_VERSION = 3


@dataclass(frozen=True)
class LinkPeer:
    """The calling end of one link to a shard."""

    call: Any
    # The identity that the caller sends in its hello.
    identity: shard_pb2.ShardIdentity

    async def shake_hands(self, protocol_version: int = PROTOCOL_VERSION) -> shard_pb2.Welcome:
        """Sends a hello and returns the welcome. Raises grpc.aio.AioRpcError where the shard refuses it."""
        hello = shard_pb2.Hello(protocol_version=protocol_version, identity=self.identity, caller="test")
        await self.send(hello=hello)
        return (await self.receive()).welcome

    async def send(self, **frame: Any) -> None:
        # Where the shard has refused the link already, the next read raises its status.
        with suppress(asyncio.InvalidStateError):
            await self.call.write(shard_pb2.LinkRequest(**frame))

    async def receive(self) -> shard_pb2.LinkResponse:
        """The next frame but heartbeats. Raises grpc.aio.AioRpcError where the link has ended with an error."""
        response = await self.call.read()
        while isinstance(response, shard_pb2.LinkResponse) and response.HasField("heartbeat"):
            response = await self.call.read()
        if not isinstance(response, shard_pb2.LinkResponse):
            raise EOFError(f"the link has ended: {await self.call.code()}")
        return response

    async def run_step(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
        """Sends one step and returns its reply."""
        await self.send(step=step)
        return (await self.receive()).reply

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end of the link, and returns the status code and message with which the shard ended it."""
        while isinstance(await _read(self.call), shard_pb2.LinkResponse):
            pass
        return await self.call.code(), await self.call.details()


async def _read(call: Any) -> Any:
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return None


@asynccontextmanager
async def open_link_peer(address: str, like: str) -> AsyncIterator[LinkPeer]:
    """Opens a link to the shard at `address` with the identity of the shard at `like`; no hello has been sent yet."""
    async with open_channel(address) as channel:
        yield LinkPeer(shard_pb2_grpc.ShardStub(channel).Link(None), (await describe(like)).identity)


async def describe(address: str) -> shard_pb2.ShardDescribeResponse:
    """The shard's reply to Describe."""
    async with open_channel(address) as channel:
        stub: shard_pb2_grpc.ShardAsyncStub = shard_pb2_grpc.ShardStub(channel)
        return await stub.Describe(shard_pb2.ShardDescribeRequest())


def opening_step(number: int, route: str, tokens: int, width: int, value: float = 0.5, **changes: Any) -> Any:
    """A step that opens session `number` with `tokens` tokens and wants the next; every hidden value is `value`.

    `changes` replaces fields of its one segment.
    """
    new_session = shard_pb2.NewSession(
        route=route,
        prompt_tokens=tokens,
        token_ids=[number % 100] * tokens,
        sampling=inference_pb2.Sampling(max_tokens=64),
    )
    segment = {"session": number, "length": tokens, "wants_token": True, "new_session": new_session, **changes}
    hidden = hidden_states([value] * tokens * width, tokens)
    return shard_pb2.Step(step=number, segments=[shard_pb2.Segment(**segment)], hidden=hidden)


def hidden_states(values: Sequence[float], tokens: int) -> shard_pb2.HiddenStates:
    """The values as float32 hidden states `[tokens, hidden_size]`."""
    return shard_pb2.HiddenStates(
        dtype=shard_pb2.DTYPE_FLOAT32,
        tokens=tokens,
        hidden_size=len(values) // tokens,
        data=struct.pack(f"<{len(values)}f", *values),
    )
