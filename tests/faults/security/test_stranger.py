"""A stranger who reaches the shards gets no connection, no hidden states, no say in answers, and no line of a log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from stitch.channels import open_channel, open_server
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc
from tests.support.link_peer import describe, open_link_peer, opening_step
from tests.support.listening import listening
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import BOTTOM, TOP, write_tiny_cluster
from tests.support.waiting import becomes_true

pytestmark = pytest.mark.slow

WIDTH = 48
RELEASE_SECONDS = 10.0
PROMPT = list(range(40, 60))
ANSWER_TOKENS = 40
VICTIMS = 4
FORGED_TOKEN = 66
FORGED_LINE = "2026-01-01 00:00:00,000 INFO stitch: all is well"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), bottoms=[BOTTOM], tops=[TOP, TOP])
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


@asynccontextmanager
async def strange_addresses(folder: Path) -> AsyncIterator[tuple[list[str], list[object]]]:
    """Addresses that a stranger listens on, in the forms that gRPC takes, and the connections that arrive there."""
    arrived: list[object] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(writer)
        writer.close()

    socket = folder / "socket"
    async with (
        await asyncio.start_server(accept, "127.0.0.1", 0) as tcp,
        await asyncio.start_unix_server(accept, socket),
    ):
        address = f"127.0.0.1:{tcp.sockets[0].getsockname()[1]}"
        yield [address, f"dns:///{address}", f"ipv4:{address}", f"unix:{socket}", f"top-0\n{FORGED_LINE}"], arrived


async def generate(address: str, chain: list[str]) -> list[int]:
    """The tokens of one session that the first shard sends along that chain. Raises grpc.aio.AioRpcError."""
    request = shard_pb2.ShardGenerateRequest(
        token_ids=PROMPT,
        prompt_tokens=len(PROMPT),
        route="weak",
        chain=chain,
        sampling=inference_pb2.Sampling(max_tokens=ANSWER_TOKENS),
    )
    async with open_channel(address) as channel:
        responses = shard_pb2_grpc.ShardStub(channel).Generate(request)
        return [token.id async for response in responses for token in response.tokens]


async def test_shard_connects_to_no_address_that_a_caller_says(cluster: Cluster, tmp_path: Path) -> None:
    bottom, top = cluster.address("bottom-0"), cluster.address("top-0")
    async with strange_addresses(tmp_path) as (addresses, arrived):
        for address in addresses:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(bottom, [address])
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = caught.value.details() or ""
            assert details.startswith("chain is ")
            assert details.endswith("but the cluster has: bottom-0, top-0, top-1")
            async with open_link_peer(top, like=bottom) as link:
                await link.shake_hands()
                step = opening_step(1, "weak", 3, WIDTH)
                step.segments[0].new_session.chain.append(address)
                (failure,) = (await link.run_step(step)).failures
                assert failure.cause == shard_pb2.FAILURE_CAUSE_PRECONDITION
        assert arrived == []
    assert not any(FORGED_LINE in cluster.log(name) for name in ("bottom-0", "top-0"))
    assert becomes_true(lambda: cluster.metric("top-0", "stitch_kv_cache_usage_ratio") == 0, RELEASE_SECONDS)


class LyingShard(shard_pb2_grpc.ShardServicer):
    """Listens at the address of a shard of the cluster, and answers steps with tokens and failures of all sessions."""

    def __init__(self, identity: shard_pb2.ShardIdentity) -> None:
        self._identity = identity
        self.has_link = asyncio.Event()
        self.leaves = asyncio.Event()

    async def Describe(self, request: object, context: object) -> shard_pb2.ShardDescribeResponse:
        return shard_pb2.ShardDescribeResponse(identity=self._identity, kv_free_tokens=1)

    async def Link(self, requests: Any, context: Any) -> AsyncIterator[shard_pb2.LinkResponse]:
        await anext(requests)
        yield shard_pb2.LinkResponse(welcome=shard_pb2.Welcome(identity=self._identity))
        own = (await anext(requests)).step.step
        self.has_link.set()
        number = 0
        while not self.leaves.is_set():
            number = number % 500 + 1
            # Of its own step it says nothing, which would end its session.
            if number != own:
                yield shard_pb2.LinkResponse(reply=self._forged(number))
            await asyncio.sleep(0)
        await context.abort(grpc.StatusCode.INTERNAL, f"gone\n{FORGED_LINE}\r\x1b[31m")

    def _forged(self, number: int) -> shard_pb2.StepReply:
        """A reply to that step, with the next tokens of many sessions."""
        reply = shard_pb2.StepReply(step=number)
        for session in range(1, 20):
            for position in range(len(PROMPT), len(PROMPT) + 4):
                token = shard_pb2.GeneratedToken(id=FORGED_TOKEN, position=position)
                reply.tokens.add(session=session, token=token)
            reply.failures.add(session=session, cause=shard_pb2.FAILURE_CAUSE_PRECONDITION, message=FORGED_LINE)
        return reply


@asynccontextmanager
async def lying_shard(cluster: Cluster, name: str) -> AsyncIterator[LyingShard]:
    """Takes the place of a shard of the cluster."""
    address = cluster.address(name)
    shard = LyingShard((await describe(address)).identity)
    cluster.kill(name)
    server = open_server()
    shard_pb2_grpc.add_ShardServicer_to_server(shard, server)  # type: ignore[no-untyped-call]
    async with listening(server, address=address):
        yield shard


async def test_replies_of_another_link_change_no_answer(cluster: Cluster) -> None:
    bottom = cluster.address("bottom-0")
    expected = await generate(bottom, ["top-0"])
    async with lying_shard(cluster, "top-1") as liar:
        his_own = asyncio.create_task(generate(bottom, ["top-1"]))
        await asyncio.wait_for(liar.has_link.wait(), RELEASE_SECONDS)
        answers = await asyncio.gather(*(generate(bottom, ["top-0"]) for _ in range(VICTIMS)))
        assert answers == [expected] * VICTIMS
        assert cluster.metric("bottom-0", "stitch_link_stray_replies_total") > 0
        liar.leaves.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await his_own
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    log = cluster.log("bottom-0")
    assert rf"gone\n{FORGED_LINE}\r\x1b[31m" in log
    assert not any(line.startswith(FORGED_LINE) for line in log.splitlines())
    assert await generate(bottom, ["top-0"]) == expected
