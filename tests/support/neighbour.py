"""A shard's neighbour by hand: speaks the link frame by frame, also what no shard would send. Computes nothing."""

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

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Neighbour:
    """One link to a shard, as the caller."""

    call: Any
    # What the caller says of itself.
    identity: shard_pb2.ShardIdentity

    async def greet(self, protocol_version: int = PROTOCOL_VERSION) -> shard_pb2.Welcome:
        """The handshake. Raises grpc.aio.AioRpcError where it is refused."""
        hello = shard_pb2.Hello(protocol_version=protocol_version, identity=self.identity, caller="test")
        await self.send(hello=hello)
        return (await self.receive()).welcome

    async def send(self, **frame: Any) -> None:
        # Where the shard has refused the link already, the next read says why.
        with suppress(asyncio.InvalidStateError):
            await self.call.write(shard_pb2.LinkRequest(**frame))

    async def receive(self) -> shard_pb2.LinkResponse:
        """The next frame. Raises grpc.aio.AioRpcError where the link has ended with an error."""
        response = await self.call.read()
        if not isinstance(response, shard_pb2.LinkResponse):
            raise EOFError(f"the link has ended: {await self.call.code()}")
        return response

    async def ask(self, step: shard_pb2.Step) -> shard_pb2.StepReply:
        """Sends one step and returns its reply."""
        await self.send(step=step)
        return (await self.receive()).reply

    async def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the shard ends the link."""
        while isinstance(await _read(self.call), shard_pb2.LinkResponse):
            pass
        return await self.call.code(), await self.call.details()


async def _read(call: Any) -> Any:
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return None


@asynccontextmanager
async def neighbour(address: str, like: str) -> AsyncIterator[Neighbour]:
    """A link to the shard at `address` by someone who claims to be the shard at `like`; not yet greeted."""
    async with open_channel(address) as channel:
        yield Neighbour(shard_pb2_grpc.ShardStub(channel).Link(None), (await describe(like)).identity)


async def describe(address: str) -> shard_pb2.ShardDescribeResponse:
    """What the shard at `address` says of itself."""
    async with open_channel(address) as channel:
        stub: shard_pb2_grpc.ShardAsyncStub = shard_pb2_grpc.ShardStub(channel)
        return await stub.Describe(shard_pb2.ShardDescribeRequest())


def opening_step(number: int, route: str, tokens: int, width: int, value: float = 0.5, **changes: Any) -> Any:
    """A step that opens session `number` with so many tokens and asks for the next; every value of them is `value`.

    `changes` are fields of its one segment.
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
    """Rows of float32, as many as `tokens`."""
    return shard_pb2.HiddenStates(
        dtype=shard_pb2.DTYPE_FLOAT32,
        tokens=tokens,
        hidden_size=len(values) // tokens,
        data=struct.pack(f"<{len(values)}f", *values),
    )
