"""What clients send to a gateway takes neither its memory, nor its log, nor its time from another client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

from stitch.channels import MAX_BATCH_REQUESTS, MAX_REQUEST_BYTES
from stitch.client import Client
from stitch.v1 import inference_pb2
from tests.support.other_client import OtherClient
from tests.support.processes import GATEWAY, Cluster
from tests.support.tiny_model import CONTEXT_LENGTH

pytestmark = pytest.mark.slow

MEBIBYTE = 1 << 20
# Of another client's health check and description while the attack runs: on a machine that does nothing else, and on
# one that runs other tests, whose processes may wait for seconds while all cores are busy.
ANSWER_SECONDS, BUSY_ANSWER_SECONDS = 0.25, 5.0
RESIDENT_BYTES = 300 * MEBIBYTE
LOG_BYTES_A_CALL = 10_000
# An entry of a batch, or a message of a chat, without any field.
EMPTY_ENTRY = b"\x0a\x00"
PARALLEL = 40
# Tokens of one character each, so that the text is refused in the end.
LONG_PROMPT = "é" * (CONTEXT_LENGTH * 3)
SECRET = "the client's own words"

Attack = Callable[[Cluster], int]


def send(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """Calls a method with these bytes, reads all its responses, and returns its status."""
    call: Any = channel.unary_stream(f"/stitch.v1.Inference/{method}", None, None)(data, timeout=60)
    with suppress(grpc.RpcError):
        for _ in call:
            pass
    code: grpc.StatusCode = call.code()
    return code


def in_parallel(cluster: Cluster, method: str, data: bytes, calls: int = PARALLEL) -> list[grpc.StatusCode]:
    """The statuses of calls at the same time, each on a connection of its own."""
    with ThreadPoolExecutor(calls) as threads, ExitStack() as stack:
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        channels = [stack.enter_context(grpc.insecure_channel(cluster.gateway, own)) for _ in range(calls)]
        return list(threads.map(lambda channel: send(channel, method, data), channels))


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field on the wire."""
    length, size = bytearray(), len(value)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + value


def chat_of_empty_messages(size_bytes: int) -> bytes:
    return field(2, EMPTY_ENTRY * (size_bytes // 2)) + field(5, b"\xff")


def refused(codes: list[grpc.StatusCode], *expected: grpc.StatusCode) -> int:
    """The number of calls, all of which have been refused with one of these statuses."""
    assert set(codes) <= set(expected)
    return len(codes)


def empty_messages_with_one_bad_byte(cluster: Cluster) -> int:
    codes = in_parallel(cluster, "Generate", chat_of_empty_messages(30 * MEBIBYTE), 2)
    codes += in_parallel(cluster, "Generate", chat_of_empty_messages(MAX_REQUEST_BYTES - 64), 4)
    return refused(codes, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


def batches_of_empty_requests(cluster: Cluster) -> int:
    codes = in_parallel(cluster, "GenerateBatch", EMPTY_ENTRY * (16 * MEBIBYTE), 2)
    codes += in_parallel(cluster, "GenerateBatch", EMPTY_ENTRY * (MAX_REQUEST_BYTES // 2), 4)
    return refused(codes, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


def batch_of_the_most_empty_requests(cluster: Cluster) -> int:
    return refused(in_parallel(cluster, "GenerateBatch", EMPTY_ENTRY * MAX_BATCH_REQUESTS, 2), grpc.StatusCode.OK)


def prompts_that_are_refused_in_the_end(cluster: Cluster) -> int:
    data = inference_pb2.GenerateRequest(prompt=f"{SECRET} {LONG_PROMPT}").SerializeToString()
    return refused(in_parallel(cluster, "Generate", data), grpc.StatusCode.INVALID_ARGUMENT)


def large_messages_at_the_same_time(cluster: Cluster) -> int:
    codes = in_parallel(cluster, "Generate", field(1, b"x" * (MAX_REQUEST_BYTES - 64)))
    return refused(codes, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


def calls_that_never_send_their_request(cluster: Cluster) -> int:
    """Silent calls beside those of another client, which are answered."""
    ended = threading.Event()

    def nothing() -> Iterator[bytes]:
        ended.wait()
        yield from ()

    with grpc.insecure_channel(cluster.gateway) as channel, Client(cluster.gateway) as other:
        stub: Any = channel.stream_stream("/stitch.v1.Inference/Generate", None, None)
        calls = [stub(nothing()) for _ in range(100)]
        answers = [other.generate("hello", max_tokens=2, timeout=10) for _ in range(40)]
        ended.set()
        for call in calls:
            call.cancel()
    assert all(answer.generated_tokens for answer in answers)
    return len(calls) + len(answers)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(ANSWER_SECONDS, marks=pytest.mark.full, id="alone"), pytest.param(BUSY_ANSWER_SECONDS, id="busy")],
)
@pytest.mark.parametrize(
    "attack",
    [
        empty_messages_with_one_bad_byte,
        batches_of_empty_requests,
        batch_of_the_most_empty_requests,
        prompts_that_are_refused_in_the_end,
        large_messages_at_the_same_time,
        calls_that_never_send_their_request,
    ],
    ids=lambda attack: attack.__name__,
)
def test_attack_takes_nothing_from_another_client(tiny_cluster: Cluster, attack: Attack, seconds: float) -> None:
    before = len(tiny_cluster.log(GATEWAY))
    with OtherClient(tiny_cluster.gateway, tiny_cluster.pid(GATEWAY)) as other:
        calls = attack(tiny_cluster)
    logged = tiny_cluster.log(GATEWAY)[before:]
    assert other.slowest_seconds <= seconds
    assert other.added_bytes <= RESIDENT_BYTES
    assert len(logged) <= LOG_BYTES_A_CALL * calls
    assert SECRET not in logged
    assert "Traceback" not in logged
