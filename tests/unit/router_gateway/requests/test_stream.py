"""Tests of the token stream: what the first shard gets, what the stream yields, and how it ends."""

from __future__ import annotations

import asyncio

import pytest

from stitch.errors import Expired
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2
from tests.support.fake_shard import END_TOKEN, waits_for
from tests.support.token_streams import PROMPT, SCRIPT, bottoms, ids, stream_input, streaming, top
from tests.support.waiting import eventually

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH


async def test_stream_yields_tokens_up_to_the_end_token() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top()) as stream:
        steps = await stream.all()
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert [step.finish for step in steps] == [inference_pb2.FINISH_REASON_UNSPECIFIED] * 6 + [STOP]
    assert list(steps[0].stages) == [inference_pb2.Stage(name="bottom_prefill", seconds=0.25)]
    assert list(steps[1].stages) == []
    assert stream.replays == {}


async def test_first_shard_gets_tokens_route_chain_and_sampling() -> None:
    [bottom], above = bottoms(1), top()
    async with streaming(bottom, above) as stream:
        await stream.all(stream_input(seed=9, max_tokens=2))
    [request] = bottom.requests
    assert list(request.token_ids) == list(PROMPT)
    assert (request.prompt_tokens, request.route, list(request.chain)) == (3, "strong", [above.name])
    assert Sampling.from_proto(request.sampling) == Sampling(seed=9, max_tokens=2, stop_token_ids=(END_TOKEN,))


async def test_max_tokens_finish_with_length() -> None:
    async with streaming(*bottoms(1), top()) as stream:
        steps = await stream.all(stream_input(max_tokens=3))
    assert ids(steps) == SCRIPT[:3]
    assert steps[-1].finish == LENGTH


@pytest.mark.parametrize(("max_tokens", "finish"), [(3, LENGTH), (50, STOP)])
async def test_finish_is_known_when_its_message_was_lost(max_tokens: int, finish: int) -> None:
    [bottom] = bottoms(1)
    bottom.omits_finish_reason = True
    async with streaming(bottom, top()) as stream:
        steps = await stream.all(stream_input(max_tokens=max_tokens))
    assert ids(steps) == [*SCRIPT, END_TOKEN][:max_tokens]
    assert steps[-1].finish == finish
    assert len(bottom.requests) == 1


async def test_shard_gets_the_rest_of_the_deadline() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top(), clock=lambda: 1_000.0) as stream:
        await stream.all(deadline=1_030.0)
        await stream.all()
    with_deadline, without = bottom.deadlines
    assert with_deadline is not None
    assert 0 < with_deadline < 31
    assert without is None


async def test_expired_request_reaches_no_shard() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top(), clock=lambda: 1_000.0) as stream:
        with pytest.raises(Expired, match="after 0 tokens"):
            await stream.all(deadline=999.0)
    assert bottom.requests == []


async def test_closing_the_stream_cancels_the_session() -> None:
    [bottom] = bottoms(1)
    bottom.faults[2] = waits_for(asyncio.Event())
    async with streaming(bottom, top()) as stream:
        async with stream.steps(stream_input()) as steps:
            await anext(aiter(steps))
            assert bottom.running == 1
        await eventually(lambda: bottom.cancelled == 1 and bottom.running == 0)


async def test_cancelling_the_reader_cancels_the_session() -> None:
    [bottom] = bottoms(1)
    bottom.faults[2] = waits_for(asyncio.Event())
    async with streaming(bottom, top()) as stream:
        reader = asyncio.create_task(stream.all())
        await eventually(lambda: not bottom.faults)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await eventually(lambda: bottom.cancelled == 1)
    assert stream.replays == {}
