"""Invalid frames on a link end the link or their session; the shard and all other sessions continue."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from stitch.channels import open_channel
from stitch.v1 import shard_pb2
from tests.support.link_peer import PROTOCOL_VERSION, LinkPeer, hidden_states, open_link_peer, opening_step
from tests.support.processes import Cluster
from tests.support.waiting import becomes_true

WIDTH = 48
RELEASE_SECONDS = 10.0


@pytest.fixture(autouse=True)
async def healthy_cluster(tiny_cluster: Cluster) -> AsyncIterator[None]:
    """After every test all processes run, answer a request and hold no KV."""
    yield
    answer = tiny_cluster.generate("stitch", route="weak", max_tokens=3, ignore_eos=True)
    assert answer.generated_tokens == 3
    assert [tiny_cluster.running(name) for name in tiny_cluster.names] == [True] * 3
    # The gateway receives the end of that answer before the top shard does.
    assert becomes_true(lambda: tiny_cluster.metric("top-0", "stitch_kv_cache_usage_ratio") == 0, RELEASE_SECONDS)


@pytest.fixture
async def link(tiny_cluster: Cluster) -> AsyncIterator[LinkPeer]:
    """A link to the top shard on which no hello has been sent."""
    async with open_link_peer(tiny_cluster.address("top-0"), like=tiny_cluster.address("bottom-0")) as opened:
        yield opened


@pytest.fixture
async def welcomed_link(link: LinkPeer) -> LinkPeer:
    welcome = await link.shake_hands()
    assert welcome.identity.shard == "top-0"
    return link


async def test_step_before_hello_is_refused(link: LinkPeer) -> None:
    await link.send(step=opening_step(1, "weak", 3, WIDTH))
    assert await link.refusal() == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the first frame of a link must be a hello",
    )


async def test_second_hello_is_refused(welcomed_link: LinkPeer) -> None:
    await welcomed_link.send(hello=shard_pb2.Hello())
    code, message = await welcomed_link.refusal()
    assert (code, message) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "a frame of kind hello came in the middle of a link",
    )


async def test_hello_with_other_protocol_version_is_refused(link: LinkPeer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await link.shake_hands(protocol_version=7)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    said = f"the protocol version of shard bottom-0 is 7, that of shard top-0 is {PROTOCOL_VERSION}"
    assert caught.value.details() == said


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        ({"tokenizer": "other"}, ["the tokenizer of shard bottom-0 is other, that of shard top-0 is "]),
        ({"wire_dtype": shard_pb2.DTYPE_INT8}, ["the wire dtype of shard bottom-0 is DTYPE_INT8, that of shard top-0"]),
        ({"role": "top"}, ["the model of shard bottom-0 is", "of width 0, that of shard top-0 is top revision"]),
    ],
)
async def test_hello_with_incompatible_identity_is_refused(
    link: LinkPeer, change: dict[str, Any], sentences: list[str]
) -> None:
    link.identity.MergeFrom(shard_pb2.ShardIdentity(**change))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await link.shake_hands()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert all(sentence in (caught.value.details() or "") for sentence in sentences)


async def test_hello_with_bottom_model_other_than_the_stitch_is_for_is_refused(link: LinkPeer) -> None:
    link.identity.bottom.revision = "0123456789abcdef"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await link.shake_hands()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    message = caught.value.details() or ""
    assert message.startswith("the stitch from layer 3 to 2 is made for the bottom model bottom revision ")
    assert message.endswith(", not for bottom revision 0123456789abcdef")


async def test_hello_with_other_cut_point_of_a_route_is_refused(link: LinkPeer) -> None:
    link.identity.routes[0].bottom_layers = 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await link.shake_hands()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (
        caught.value.details()
        == "the cut point of route weak of shard bottom-0 is (1, 2), that of shard top-0 is (3, 2)"
    )


def with_hidden(step: Any, **changes: Any) -> Any:
    """The step with changed fields of its hidden states."""
    for name, value in changes.items():
        setattr(step.hidden, name, value)
    return step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": b"\0" * 100}, "hidden.data is '100 bytes', but the shape [3, 48] takes 576"),
        ({"data": b""}, "hidden.data is '0 bytes', but the shape [3, 48] takes 576"),
        ({"tokens": 4_000_000_000}, "hidden.data is '576 bytes', but the shape [4000000000, 48] takes 768000000000"),
        ({"hidden_size": 64}, "hidden.hidden_size is 64, but the receiver expects 48"),
        ({"dtype": shard_pb2.DTYPE_FLOAT16}, "hidden.dtype is 'DTYPE_FLOAT16', but this link carries DTYPE_FLOAT32"),
        ({"dtype": 99}, "hidden.dtype is '99', but this link carries DTYPE_FLOAT32"),
        ({"scales": b"\0" * 12}, "hidden.scales is '12 bytes', but 3 tokens take 0"),
    ],
)
async def test_hidden_states_that_do_not_fit_their_shape_are_refused(
    welcomed_link: LinkPeer, changes: dict[str, Any], message: str
) -> None:
    await welcomed_link.send(step=with_hidden(opening_step(1, "weak", 3, WIDTH), **changes))
    assert await welcomed_link.refusal() == (grpc.StatusCode.INVALID_ARGUMENT, message)


async def test_step_that_announces_too_many_tokens_is_refused(welcomed_link: LinkPeer) -> None:
    step = opening_step(1, "weak", 3, WIDTH)
    step.tokens_to_come = 4_000_000_000
    await welcomed_link.send(step=step)
    code, message = await welcomed_link.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("step.hidden.tokens is 4000000003, but a step holds at most ")


async def test_segments_with_other_token_count_than_hidden_states_are_refused(welcomed_link: LinkPeer) -> None:
    await welcomed_link.send(step=opening_step(1, "weak", 3, WIDTH, length=2))
    assert await welcomed_link.refusal() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "step.segments is '2 tokens in 1 segments', but 3 of the step's 3 have come",
    )


async def test_frame_without_kind_is_refused(welcomed_link: LinkPeer) -> None:
    await welcomed_link.send()
    code, message = await welcomed_link.refusal()
    assert (code, message) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "a frame of kind unknown came in the middle of a link",
    )


@pytest.mark.parametrize("says_hello", [True, False])
async def test_undecodable_bytes_end_the_link(tiny_cluster: Cluster, link: LinkPeer, says_hello: bool) -> None:
    hello = shard_pb2.LinkRequest(hello=shard_pb2.Hello(protocol_version=PROTOCOL_VERSION, identity=link.identity))
    async with open_channel(tiny_cluster.address("top-0")) as channel:
        raw: Any = channel.stream_stream("/stitch.v1.Shard/Link", None, None)
        call = raw()
        if says_hello:
            await call.write(hello.SerializeToString())
            assert shard_pb2.LinkResponse.FromString(await call.read()).HasField("welcome")
        await call.write(b"\xff" * 64)
        raw_link = LinkPeer(call, link.identity)
        code, message = await raw_link.refusal()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message.startswith("frame is ")
        assert message.endswith("but it must be a stitch.v1.LinkRequest")


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_non_finite_hidden_states_fail_only_their_session(welcomed_link: LinkPeer, value: float) -> None:
    step = opening_step(1, "weak", 3, WIDTH, value=value)
    finite = opening_step(2, "weak", 3, WIDTH)
    step.segments.extend(finite.segments)
    step.hidden.CopyFrom(hidden_states([value] * 3 * WIDTH + [0.5] * 3 * WIDTH, 6))
    reply = await welcomed_link.run_step(step)
    assert [(one.session, one.cause) for one in reply.failures] == [(1, shard_pb2.FAILURE_CAUSE_PRECONDITION)]
    assert reply.failures[0].message == "hidden states of session 1 at position 0 are not finite"
    assert [(one.session, one.token.position) for one in reply.tokens] == [(2, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 5}, "session 1 sends epoch 0, position 5, but epoch 0, position 3 comes next"),
        ({"position": 3, "epoch": 2}, "session 1 sends epoch 2, position 3, but epoch 0, position 3 comes next"),
        ({"session": 9, "position": 3}, "session 9 is not open here"),
    ],
)
async def test_wrong_position_fails_only_its_session(
    welcomed_link: LinkPeer, changes: dict[str, Any], message: str
) -> None:
    assert len((await welcomed_link.run_step(opening_step(1, "weak", 3, WIDTH))).tokens) == 1
    assert len((await welcomed_link.run_step(opening_step(2, "strong", 2, WIDTH))).tokens) == 1
    misplaced = shard_pb2.Step(
        step=3,
        segments=[shard_pb2.Segment(**{"session": 1, "length": 1, "wants_token": True, **changes})],
        hidden=hidden_states([0.5] * WIDTH, 1),
    )
    failures = (await welcomed_link.run_step(misplaced)).failures
    assert [(one.cause, one.message) for one in failures] == [(shard_pb2.FAILURE_CAUSE_PRECONDITION, message)]
    continued = shard_pb2.Segment(session=2, position=2, length=1, wants_token=True)
    reply = await welcomed_link.run_step(
        shard_pb2.Step(step=4, segments=[continued], hidden=hidden_states([0.5] * WIDTH, 1))
    )
    assert [(one.session, one.token.position) for one in reply.tokens] == [(2, 3)]


async def test_session_with_a_shard_that_the_cluster_lacks_fails(welcomed_link: LinkPeer) -> None:
    step = opening_step(1, "weak", 3, WIDTH)
    step.segments[0].new_session.chain.append("127.0.0.1:1")
    failures = (await welcomed_link.run_step(step)).failures
    assert [one.cause for one in failures] == [shard_pb2.FAILURE_CAUSE_PRECONDITION]
    assert failures[0].message == "chain is '127.0.0.1:1', but the cluster has: bottom-0, top-0"


async def test_first_shard_refuses_an_upstream_link(tiny_cluster: Cluster) -> None:
    bottom = tiny_cluster.address("bottom-0")
    async with open_link_peer(bottom, like=bottom) as link:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await link.shake_hands()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "shard bottom-0 is the first of its chain: it has no upstream shard"
