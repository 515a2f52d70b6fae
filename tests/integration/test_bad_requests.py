"""Invalid requests are refused with field, value and limit, allocate nothing, and affect no other request."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from stitch.client import Client
from stitch.errors import InvalidRequest, from_rpc_error
from stitch.v1 import inference_pb2, shard_pb2, shard_pb2_grpc
from tests.support.processes import Cluster
from tests.support.tiny_model import CONTEXT_LENGTH, TOKENS

MEGABYTE = 1 << 20
# Fields of the request, the invalid field, its value as the message shows it, and its limit.
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"prompt": ""}, "prompt", "''", "it must not be empty"),
    ({"messages": []}, "chat.messages", "empty", "a conversation has at least one"),
    ({"prompt": "é" * CONTEXT_LENGTH}, "prompt", "4,096 tokens", "the context holds 2,048, the answer included"),
    ({"prompt": "x" * MEGABYTE}, "prompt", "1,048,576 bytes", "the context of 2,048 tokens holds at most"),
    ({"max_tokens": 0}, "sampling.max_tokens", "0", "it must be at least 1"),
    ({"temperature": -1.0}, "sampling.temperature", "-1.0", "it must be at least 0 and at most 100"),
    ({"temperature": math.nan}, "sampling.temperature", "nan", "it must be at least 0 and at most 100"),
    ({"temperature": math.inf}, "sampling.temperature", "inf", "it must be at least 0 and at most 100"),
    ({"top_p": 2.0}, "sampling.top_p", "2.0", "it must be more than 0 and at most 1"),
    ({"top_p": math.nan}, "sampling.top_p", "nan", "it must be more than 0 and at most 1"),
    ({"stop_token_ids": [TOKENS + 100]}, "sampling.stop_token_ids[0]", str(TOKENS + 100), "the vocabulary ends at"),
    # The top has a row for it, the bottom and the tokenizer have none.
    ({"forced_token_ids": [TOKENS]}, "sampling.forced_token_ids[0]", str(TOKENS), "the vocabulary ends at"),
    ({"route": "sideways"}, "route", "'sideways'", "this cluster has: weak, strong, auto"),
]


def refused(cluster: Cluster) -> float:
    """The number of requests that the gateway has refused."""
    return cluster.metric("gateway", "stitch_request_duration_seconds_count", outcome="invalid")


@pytest.mark.parametrize(("fields", "field", "value", "limit"), REFUSED, ids=[f"{row[1]}={row[2]}" for row in REFUSED])
def test_invalid_request_is_refused_with_field_value_and_limit(
    tiny_cluster: Cluster, fields: dict[str, Any], field: str, value: str, limit: str
) -> None:
    before = refused(tiny_cluster)
    given = fields if "messages" in fields else {"prompt": "stitch", **fields}
    with pytest.raises(InvalidRequest) as caught:
        tiny_cluster.generate(**given)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is {value}, but {limit}")
    assert refused(tiny_cluster) == before + 1
    assert tiny_cluster.metric("bottom-0", "stitch_sessions_running") == 0


@pytest.mark.parametrize(
    ("request_bytes", "field", "message"),
    [
        (b"\x0a\x04caf\xe9", "prompt", "prompt is b'caf\\xe9', but it must be UTF-8, and byte 3 is 0xe9"),
        (
            inference_pb2.GenerateRequest(prompt="x").SerializeToString() + b"\x2a\x02\xff\xfe",
            "route",
            "route is b'\\xff', but it must be UTF-8, and byte 0 is 0xff",
        ),
        (b"\x0a\x7fx", "request", "request is 3 bytes, but they are no stitch.v1.GenerateRequest"),
    ],
)
def test_undecodable_request_is_refused(tiny_cluster: Cluster, request_bytes: bytes, field: str, message: str) -> None:
    with grpc.insecure_channel(tiny_cluster.gateway) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream("/stitch.v1.Inference/Generate", None, None)(request_bytes))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert (error.field, str(error)) == (field, message)


def test_invalid_request_of_a_batch_fails_alone(tiny_cluster: Cluster) -> None:
    requests = [{"prompt": "stitch", "max_tokens": 4, "ignore_eos": True}, {"prompt": "stitch", "top_p": 2.0}]
    answer, error = tiny_cluster.client.batch(requests)
    assert not isinstance(answer, Exception)
    assert answer.generated_tokens == 4
    assert isinstance(error, InvalidRequest)
    assert error.field == "sampling.top_p"


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"token_ids": []}, "token_ids", "token_ids is '0 tokens', but there must be 1 to 2047"),
        ({"token_ids": [1] * CONTEXT_LENGTH}, "token_ids", "token_ids is '2048 tokens', but there must be 1 to 2047"),
        ({"token_ids": [TOKENS]}, "token_ids", f"token_ids is {TOKENS}, but the vocabulary has {TOKENS} tokens"),
        ({"prompt_tokens": 2}, "prompt_tokens", "prompt_tokens is 2, but it must be 1 to 1"),
        ({"route": "sideways"}, "route", "route is 'sideways', but this cluster has: weak, strong, auto"),
        ({"chain": []}, "chain", "chain is [], but after bottom-0 route weak passes top-0"),
        ({"chain": ["bottom-0"]}, "chain", "chain is ['bottom-0'], but after bottom-0 route weak passes top-0"),
        ({"chain": ["unix:/tmp/s"]}, "chain", "chain is 'unix:/tmp/s', but the cluster has: bottom-0, top-0"),
        (
            {"sampling": inference_pb2.Sampling(temperature=math.nan)},
            "sampling.temperature",
            "sampling.temperature is nan, but it must be at least 0 and at most 100",
        ),
    ],
)
def test_shard_refuses_invalid_request_of_a_gateway(
    tiny_cluster: Cluster, changes: dict[str, Any], field: str, message: str
) -> None:
    whole: dict[str, Any] = {"token_ids": [1], "prompt_tokens": 1, "route": "weak", "chain": ["top-0"]}
    request = shard_pb2.ShardGenerateRequest(**{**whole, **changes})
    with grpc.insecure_channel(tiny_cluster.address("bottom-0")) as channel, pytest.raises(grpc.RpcError) as caught:
        list(shard_pb2_grpc.ShardStub(channel).Generate(request))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert (error.field, str(error)) == (field, message)


def test_later_shard_refuses_to_start_a_chain(tiny_cluster: Cluster) -> None:
    request = shard_pb2.ShardGenerateRequest(token_ids=[1], prompt_tokens=1, route="weak", chain=["top-0"])
    with grpc.insecure_channel(tiny_cluster.address("top-0")) as channel, pytest.raises(grpc.RpcError) as caught:
        list(shard_pb2_grpc.ShardStub(channel).Generate(request))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "shard top-0 holds top layers without the embedding: it is no first shard"


def test_prompt_that_almost_fills_the_context_is_answered(tiny_cluster: Cluster) -> None:
    with Client(tiny_cluster.gateway) as client:
        answer = client.generate("é" * (CONTEXT_LENGTH // 2 - 1), route="weak", max_tokens=100, ignore_eos=True)
    assert (answer.prompt_tokens, answer.generated_tokens, answer.finish_reason) == (CONTEXT_LENGTH - 2, 2, "length")
