"""One client's answer stays what it is alone, whatever anybody else sends to gateway and shards."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from threading import Semaphore
from typing import Any

import grpc
import pytest

from stitch.channels import open_channel, open_sync_channel
from stitch.client import Answer
from stitch.v1 import inference_pb2, shard_pb2
from tests.support.link_peer import PROTOCOL_VERSION, describe, hidden_states, opening_step
from tests.support.processes import Cluster, running_cluster
from tests.support.random_messages import changed, garbled, sampling
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.tiny_model import TOKENS
from tests.support.waiting import becomes_true

WIDTH = 48
# By route the shards after the first one; "weak" enters the top model on the middle shard, "strong" on the last one.
CHAINS = {"weak": ("top-0", "top-1"), "strong": ("top-1",)}
ROUTES = tuple(CHAINS)
# What others send meanwhile, in equal shares to the gateway, the first shard, and the middle one with the last one.
MESSAGES = 600
ALL_MESSAGES = 100_000
# Senders to each of gateway and first shard; each waits for its answers, at most this long.
SENDERS = 4
ANSWER_SECONDS = 0.5
FRAMES_OF_A_LINK = 40
REPLY_SECONDS = 0.02
RELEASE_SECONDS = 20.0
QUESTION: dict[str, Any] = {
    "prompt": "the quick brown fox jumps over the lazy dog, and then",
    "route": "weak",
    "temperature": 0.8,
    "seed": 5,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "logprobs": 2,
    "max_tokens": 12,
    "ignore_eos": True,
}
# A defect, in any program.
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), tops=((2, 3), (3, 4)))
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


class RandomSenders:
    """Everybody else: sends random messages, seeded, and counts the statuses of their ends."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._draw = Random(seed)
        self.ends: Counter[grpc.StatusCode] = Counter()
        self.defects: list[str] = []

    def question(self) -> inference_pb2.GenerateRequest:
        draw = self._draw
        return inference_pb2.GenerateRequest(
            prompt="".join(draw.choices("abc xyz<|é>", k=draw.randint(1, 40))),
            route=draw.choice(("", *ROUTES)),
            sampling=sampling(draw, TOKENS),
        )

    def batch(self) -> inference_pb2.GenerateBatchRequest:
        return inference_pb2.GenerateBatchRequest(requests=[self.question() for _ in range(3)])

    def session(self) -> shard_pb2.ShardGenerateRequest:
        draw = self._draw
        ids = [draw.randrange(TOKENS) for _ in range(draw.randint(1, 40))]
        message = shard_pb2.ShardGenerateRequest(
            token_ids=ids, prompt_tokens=draw.randint(1, len(ids)), sampling=sampling(draw, TOKENS)
        )
        if draw.random() < 0.3:
            for route in ROUTES:
                message.candidates.add(route=route, chain=self._chain(route))
        else:
            message.route = draw.choice(ROUTES)
            # Sometimes that of another route.
            message.chain.extend(self._chain(message.route if draw.random() < 0.9 else draw.choice(ROUTES)))
        return message

    @staticmethod
    def _chain(route: str) -> list[str]:
        return list(CHAINS[route])

    def frame(self) -> shard_pb2.LinkRequest:
        """A step that opens or continues one of a few sessions, or the end of one."""
        draw, session = self._draw, self._draw.randint(1, 5)
        kind = draw.random()
        if kind < 0.1:
            return shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=[session]))
        if kind < 0.3:
            segment = shard_pb2.Segment(session=session, position=draw.randint(1, 8), length=1, wants_token=True)
            hidden = hidden_states([draw.uniform(-2, 2) for _ in range(WIDTH)], 1)
            return shard_pb2.LinkRequest(step=shard_pb2.Step(step=session, segments=[segment], hidden=hidden))
        route = draw.choice(ROUTES)
        step = opening_step(session, route, draw.randint(1, 8), WIDTH, draw.choice((0.5, 1e38, -3.0)))
        step.segments[0].new_session.sampling.CopyFrom(sampling(draw, TOKENS))
        step.segments[0].new_session.chain.extend(self._chain(route)[1:])
        return shard_pb2.LinkRequest(step=step)

    def bytes_of(self, make: Callable[[], Any]) -> bytes:
        """A message: as it is, with some fields changed, or with some bytes changed."""
        message, draw = make(), self._draw
        for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
            changed(message, draw)
        data: bytes = message.SerializeToString()
        return garbled(data, draw) if draw.random() < 0.1 else data

    async def call(self, address: str, method: str, make: Callable[[], Any], count: int) -> None:
        """Calls a method with one response after another."""
        async with open_channel(address) as channel:
            stub: Any = channel.unary_stream(method, None, None)
            for _ in range(count):
                data = self.bytes_of(make)
                call = stub(data, timeout=ANSWER_SECONDS)
                while (response := await _read(call)) is not None:
                    if method.endswith("Batch"):
                        self._check(inference_pb2.GenerateBatchResponse.FromString(response).error, data)
                self._end(await call.code(), await call.details(), data)

    def link(self, address: str, identity: shard_pb2.ShardIdentity, count: int) -> None:
        """Sends frames to a shard, over a new link after each refusal.

        Without an event loop: gRPC's asynchronous client loses the status of a stream that ends while it writes.
        """
        hello = shard_pb2.LinkRequest(hello=shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=identity))
        with open_sync_channel(address) as channel:
            stub: Any = channel.stream_stream("/stitch.v1.Shard/Link", None, None)
            while count > 0:
                sent, replied = [hello.SerializeToString()], Semaphore(0)
                call = stub(self._frames(sent, replied))
                with suppress(grpc.RpcError):
                    for _ in call:
                        replied.release()
                self._end(call.code(), call.details(), sent[-1])
                count -= len(sent)

    def _frames(self, sent: list[bytes], replied: Semaphore) -> Iterator[bytes]:
        """The frames of one link, each after the reply to the last one, or a pause: not every frame has a reply."""
        yield sent[0]
        for _ in range(FRAMES_OF_A_LINK):
            replied.acquire(timeout=REPLY_SECONDS)
            sent.append(self.bytes_of(self.frame))
            yield sent[-1]
        time.sleep(REPLY_SECONDS)

    def _check(self, error: inference_pb2.RequestError, data: bytes) -> None:
        if error.code in [code.value[0] for code in DEFECTS]:
            self.defects.append(f"{error.message}: {data[:200]!r}")

    def _end(self, code: grpc.StatusCode, details: str, data: bytes) -> None:
        self.ends[code] += 1
        if code in DEFECTS:
            self.defects.append(f"{code.name}: {details}: {data[:200]!r}")


async def _read(call: Any) -> bytes | None:
    """The next response; None at the end, whatever its status."""
    try:
        response = await call.read()
    except grpc.aio.AioRpcError:
        return None
    return response if isinstance(response, bytes) else None


async def answers_beside(cluster: Cluster, senders: RandomSenders, messages: int) -> list[Answer]:
    """The bystander's answers, one after another, until the senders have sent their messages."""
    share = messages // 3
    identity = (await describe(cluster.address("bottom-0"))).identity
    tops = [cluster.address(name) for name in CHAINS["weak"]] * (SENDERS // 2)
    calls: list[Any] = [asyncio.to_thread(senders.link, top, identity, share // SENDERS) for top in tops]
    for _ in range(SENDERS):
        gateway, first = cluster.gateway, cluster.address("bottom-0")
        calls.append(senders.call(gateway, "/stitch.v1.Inference/Generate", senders.question, share // SENDERS // 2))
        calls.append(senders.call(gateway, "/stitch.v1.Inference/GenerateBatch", senders.batch, share // SENDERS // 2))
        calls.append(senders.call(first, "/stitch.v1.Shard/Generate", senders.session, share // SENDERS))
    sending = asyncio.gather(*calls)
    answers = []
    while not sending.done():
        answers.append(await asyncio.to_thread(cluster.generate, **QUESTION))
    await sending
    return answers


def traceback_in(log: str) -> str:
    """The first traceback in a log, if there is one."""
    return log[log.index("Traceback") :][:4_000] if "Traceback" in log else ""


def essence(answer: Answer) -> tuple[Any, ...]:
    return answer.text, tuple(answer.token_ids), answer.finish_reason


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("messages", [MESSAGES, pytest.param(ALL_MESSAGES, marks=pytest.mark.full)])
async def test_answer_beside_random_requests_and_frames_is_what_it_is_alone(cluster: Cluster, messages: int) -> None:
    alone = essence(cluster.generate(**QUESTION))
    senders = RandomSenders(cluster, seed=messages)
    answers = await answers_beside(cluster, senders, messages)
    assert {essence(answer) for answer in answers} == {alone}
    assert senders.defects == []
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= set(senders.ends)
    for name in cluster.names:
        assert cluster.running(name)
        assert traceback_in(cluster.log(name)) == ""
    for name in ("bottom-0", "top-0", "top-1"):
        free = lambda: cluster.metric(name, "stitch_kv_cache_usage_ratio") == 0  # noqa: B023, E731
        assert becomes_true(free, RELEASE_SECONDS)
