"""Several answers to one request, through a whole gateway over fake shards."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest

from stitch.errors import from_rpc_error
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2
from tests.support.byte_tokenizer import tokens
from tests.support.fake_shard import END_TOKEN, FakeShard, aborts, waits_for
from tests.support.waiting import eventually
from tests.unit.router_gateway.conftest import Reach

TEXT = "hello world, hello there"
STOP = inference_pb2.FINISH_REASON_STOP

Events = Sequence[inference_pb2.GenerateResponse]


def shards(*names: str) -> list[FakeShard]:
    return [*(FakeShard(name, "bottom", tokens(TEXT)) for name in names or ("bottom-0",)), FakeShard("top-0", "top")]


def text_of(events: Events, answer: int) -> str:
    return "".join(event.delta.text for event in events if event.answer == answer)


def finished(events: Events) -> dict[int, inference_pb2.Finished]:
    return {event.answer: event.finished for event in events if event.HasField("finished")}


async def test_answers_are_numbered_and_each_one_finishes(reach: Reach) -> None:
    bottom, top = shards()
    bottom.cached_tokens = 16
    async with reach(bottom, top) as gateway:
        events = await gateway.generate(n=3, sampling=inference_pb2.Sampling(seed=7, temperature=1.0))
        assert gateway.metric("stitch_generated_tokens_total", route="weak") == 3 * (len(tokens(TEXT)) + 1)
        assert gateway.metric("stitch_time_to_first_token_seconds_count", route="weak") == 1
        assert gateway.metric("stitch_request_duration_seconds_count", route="weak", outcome="stop") == 1
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert events[0].HasField("started")
    assert [text_of(events, answer) for answer in range(3)] == [TEXT] * 3
    ends = finished(events)
    assert sorted(ends) == [0, 1, 2]
    for end in ends.values():
        assert (end.reason, end.generated_tokens, end.cached_tokens) == (STOP, len(tokens(TEXT)) + 1, 16)
        assert 0 < end.ttft_seconds <= end.total_seconds
    assert [bool(ends[answer].stages) for answer in range(3)] == [True, False, False]
    given = [request.sampling.seed for request in bottom.requests]
    assert given == [Sampling(seed=7).of_answer(answer).seed for answer in range(3)]


async def test_other_answers_start_with_the_first_token_of_the_first_one(reach: Reach) -> None:
    bottom, top = shards()
    first_token, second_token = asyncio.Event(), asyncio.Event()
    bottom.faults = {0: waits_for(first_token), 1: waits_for(second_token)}
    async with reach(bottom, top) as gateway:
        generating = asyncio.create_task(gateway.generate(n=3))
        await eventually(lambda: len(bottom.requests) == 1)
        await asyncio.sleep(0.05)
        assert len(bottom.requests) == 1
        first_token.set()
        await eventually(lambda: len(bottom.requests) == 3)
        second_token.set()
        assert sorted(finished(await generating)) == [0, 1, 2]


async def test_all_answers_are_on_the_shards_that_computed_the_prompt(reach: Reach) -> None:
    *bottoms, top = shards("bottom-0", "bottom-1")
    async with reach(*bottoms, top) as gateway:
        await gateway.generate(n=4)
    assert sorted(len(bottom.requests) for bottom in bottoms) == [0, 4]


async def test_each_answer_goes_on_with_other_shards_by_itself(reach: Reach) -> None:
    first, second, top = shards("bottom-0", "bottom-1")
    first.free_kv_tokens += 1
    first.faults[3] = aborts(grpc.StatusCode.UNAVAILABLE)
    async with reach(first, second, top) as gateway:
        events = await gateway.generate(n=3)
    assert [text_of(events, answer) for answer in range(3)] == [TEXT] * 3
    assert sum(end.replays for end in finished(events).values()) == 1
    assert len(first.requests) == 3
    [replayed] = second.requests
    assert len(replayed.token_ids) == replayed.prompt_tokens + 3


async def test_answer_that_fails_ends_the_others(reach: Reach) -> None:
    bottom, top = shards()
    bottom.faults = {2: waits_for(asyncio.Event()), 4: aborts(grpc.StatusCode.OUT_OF_RANGE)}
    async with reach(bottom, top) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.generate(n=3)
        assert str(from_rpc_error(caught.value)) == "scripted"
        await eventually(lambda: bottom.running == 0)
        assert gateway.metric("stitch_request_duration_seconds_count", route="weak", outcome="unmet") == 1
        assert gateway.metric("stitch_requests_running") == 0


async def test_client_that_leaves_ends_all_answers(reach: Reach) -> None:
    bottom, top = shards()
    bottom.script_waits = asyncio.Event()
    async with reach(bottom, top) as gateway:
        call = gateway.stub.Generate(inference_pb2.GenerateRequest(prompt="hello", n=8))
        await eventually(lambda: bottom.running == 8)
        call.cancel()
        await eventually(lambda: bottom.running == 0)
        assert bottom.cancelled == 8
        await eventually(lambda: gateway.metric("stitch_requests_running") == 0)


async def test_stop_string_ends_its_answer_alone(reach: Reach) -> None:
    bottom, top = shards()
    async with reach(bottom, top) as gateway:
        events = await gateway.generate(n=2, stop=[" world"])
    assert [text_of(events, answer) for answer in range(2)] == ["hello"] * 2


async def test_slow_client_holds_up_generating_and_loses_nothing(reach: Reach) -> None:
    bottom, top = FakeShard("bottom-0", "bottom", tokens("hello ") * 30), FakeShard("top-0", "top")
    request = inference_pb2.GenerateRequest(prompt="hello", n=16, sampling=inference_pb2.Sampling(max_tokens=60))
    events: list[inference_pb2.GenerateResponse] = []
    async with reach(bottom, top) as gateway:
        async for event in gateway.stub.Generate(request):
            events.append(event)
            await asyncio.sleep(0)
    ids = {answer: [i for e in events if e.answer == answer for i in e.delta.token_ids] for answer in range(16)}
    assert list(ids.values()) == [[*bottom.script, *[END_TOKEN]][:60]] * 16


async def test_tokens_of_the_prompt_come_with_their_log_probabilities_before_the_answer(reach: Reach) -> None:
    bottom, top = shards()
    bottom.logprob = -0.5
    prompt = tokens("hello there")
    sampling = inference_pb2.Sampling(logprobs=0, max_tokens=20, min_tokens=2)
    async with reach(bottom, top) as gateway:
        # The stop string is in the prompt, too.
        events = await gateway.generate("hello there", sampling=sampling, prompt_logprobs=True, stop=[" there"])
    [request] = bottom.requests
    assert list(request.token_ids) == prompt[:1]
    assert list(request.sampling.forced_token_ids) == prompt[1:]
    assert (request.sampling.max_tokens, request.sampling.min_tokens) == (20 + len(prompt) - 1, 2 + len(prompt) - 1)
    assert text_of(events, 0) == "hello world, hello"
    entries = [entry.token_id for event in events for entry in event.delta.logprobs]
    assert entries == [*prompt[1:], *tokens(TEXT)]
    [end] = finished(events).values()
    assert (end.prompt_tokens, end.generated_tokens) == (len(prompt), len(tokens(TEXT)))


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (inference_pb2.Sampling(), "prompt_logprobs"),
        (inference_pb2.Sampling(logprobs=1, presence_penalty=1.0), "sampling.presence_penalty"),
        (inference_pb2.Sampling(logprobs=1, frequency_penalty=1.0), "sampling.frequency_penalty"),
    ],
)
async def test_log_probabilities_of_a_prompt_exclude_what_counts_generated_tokens(
    reach: Reach, sampling: inference_pb2.Sampling, field: str
) -> None:
    async with reach(*shards()) as gateway:
        with pytest.raises(grpc.aio.AioRpcError, match=f"{field} is"):
            await gateway.generate(sampling=sampling, prompt_logprobs=True)
