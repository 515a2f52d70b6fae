"""Tests of failover: with any fault the same tokens as without, each of them once, or the error that says why."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from stitch.errors import Expired, Forbidden, Incompatible, OutOfStep, StitchError, Unavailable
from tests.support.fake_shard import END_TOKEN, FakeShard, Fault, aborts, ends_stream_early, raises, waits_for
from tests.support.token_streams import PROMPT, SCRIPT, bottoms, ids, stream_input, streaming, top
from tests.support.waiting import eventually

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("before_token", [0, 1, 4])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (aborts(UNAVAILABLE), "unavailable"),
        (aborts(grpc.StatusCode.CANCELLED), "cancelled"),
        (aborts(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), "unavailable"),
        (aborts(grpc.StatusCode.INTERNAL), "failed"),
        (aborts(grpc.StatusCode.UNKNOWN), "failed"),
        (aborts(grpc.StatusCode.PERMISSION_DENIED), "unavailable"),
        (aborts(grpc.StatusCode.UNAUTHENTICATED), "unavailable"),
        (raises(Incompatible("top-0 has other layers")), "incompatible"),
        (ends_stream_early, "cut"),
    ],
)
async def test_lost_chain_is_replaced_and_tokens_stay_the_same(before_token: int, fault: Fault, cause: str) -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[before_token] = fault
    async with streaming(first, second, top()) as stream:
        steps = await stream.all(stream_input(seed=4))
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {cause: 1}
    [again] = second.requests
    assert list(again.token_ids) == [*PROMPT, *SCRIPT[:before_token]]
    assert again.prompt_tokens == len(PROMPT)
    assert again.sampling.seed == 4


async def test_token_at_a_wrong_position_counts_as_out_of_step() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.position_error = 1
    async with streaming(first, second, top()) as stream:
        steps = await stream.all()
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"out_of_step": 1}


async def test_only_chain_is_retried() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {2: aborts(UNAVAILABLE), 3: aborts(UNAVAILABLE)}
    async with streaming(bottom, top()) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"unavailable": 2}


async def test_answer_waits_for_a_restarted_shard() -> None:
    [bottom], above = bottoms(1), top()
    hold = asyncio.Event()
    bottom.faults[2] = waits_for(hold)
    async with streaming(bottom, above) as stream:
        answer = asyncio.create_task(stream.all())
        await eventually(lambda: bottom.running)
        await bottom.stop()
        await bottom.start()
        assert ids(await answer) == [*SCRIPT, END_TOKEN]


async def test_session_on_a_silent_shard_is_replayed_elsewhere() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[3] = waits_for(asyncio.Event())
    async with streaming(first, second, top()) as stream:
        answer = asyncio.create_task(stream.all())
        await eventually(lambda: first.running and not first.faults)
        first.answers_describe.clear()
        await stream.refresh()
        assert ids(await answer) == [*SCRIPT, END_TOKEN]
        assert stream.replays == {"unreachable": 1}
        await eventually(lambda: first.cancelled)
        first.answers_describe.set()


async def test_unavailable_has_the_number_of_generated_tokens() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {4: aborts(UNAVAILABLE, "broken")}
    async with streaming(bottom, top(), max_failures=0) as stream:
        with pytest.raises(Unavailable, match="after 4 tokens: bottom-0 ended with UNAVAILABLE") as caught:
            await stream.all()
    assert caught.value.generated_tokens == 4


async def test_retry_ends_after_wait_seconds() -> None:
    now = [0.0]

    async def breaks(context: object) -> None:
        now[0] = 100.0
        await aborts(UNAVAILABLE)(context)  # type: ignore[arg-type]

    [bottom] = bottoms(1)
    bottom.faults = {1: breaks}
    above = top()
    async with streaming(bottom, above, wait_seconds=0.0, clock=lambda: now[0]) as stream:
        with pytest.raises(Unavailable) as caught:
            await stream.all()
    assert caught.value.generated_tokens == 1


async def test_chain_that_failed_long_ago_is_tried_before_giving_up() -> None:
    now = [0.0]

    async def breaks(context: object) -> None:
        now[0] = 100.0
        await aborts(UNAVAILABLE)(context)  # type: ignore[arg-type]

    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[1], second.faults[1] = aborts(UNAVAILABLE), breaks
    async with streaming(first, second, top(), clock=lambda: now[0]) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert [len(shard.requests) for shard in (first, second)] == [2, 1]


async def test_new_request_without_any_chain_fails_at_once() -> None:
    [bottom], above = bottoms(1), top()
    async with streaming(bottom, above, wait_seconds=1e9) as stream:
        await above.stop()
        await stream.refresh()
        with pytest.raises(Unavailable) as caught:
            await stream.all()
    assert caught.value.generated_tokens == 0
    assert bottom.requests == []


async def test_retry_ends_after_max_failures() -> None:
    shards = bottoms(6)
    for shard in shards:
        shard.faults[1] = aborts(UNAVAILABLE)
    async with streaming(*shards, top(), max_failures=2) as stream:
        with pytest.raises(Unavailable):
            await stream.all()
    assert sum(len(shard.requests) for shard in shards) == 3


async def test_token_clears_the_failure_record() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {index: aborts(UNAVAILABLE) for index in range(1, 6)}
    async with streaming(bottom, top(), max_failures=1) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (aborts(grpc.StatusCode.DEADLINE_EXCEEDED, "as it is"), Expired, "as it is"),
        # What no shard has said may have its address.
        (aborts(grpc.StatusCode.INVALID_ARGUMENT, "at h:1"), StitchError, "bottom-0 ended with INVALID_ARGUMENT$"),
        (raises(OutOfStep("as it is")), OutOfStep, "as it is"),
    ],
)
async def test_error_of_the_request_is_not_retried(fault: Fault, kind: type[StitchError], said: str) -> None:
    first, second = bottoms(2)
    for shard in (first, second):
        shard.faults[0] = fault
    async with streaming(first, second, top()) as stream:
        with pytest.raises(kind, match=said):
            await stream.all()
    assert len(first.requests) + len(second.requests) == 1


class TestReasons:
    """An error says which shard failed, or only that one did."""

    async def test_only_the_named_shard_is_avoided(self) -> None:
        first, second = bottoms(2)
        above = [FakeShard("top-0", "top"), FakeShard("top-1", "top")]
        first.free_kv_tokens += 1
        above[0].free_kv_tokens += 1
        first.faults[2] = raises(Unavailable("top-0 is gone", shard="top-0"))
        async with streaming(first, second, *above) as stream:
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert [list(request.chain) for request in first.requests] == [["top-0"], ["top-1"]]
            assert not second.requests
            avoided = {name: stream.replica(name).avoided for name in ("bottom-0", "bottom-1", "top-0", "top-1")}
            assert [name for name, is_avoided in avoided.items() if is_avoided] == ["top-0"]

    async def test_replica_whose_sessions_all_fail_gets_no_more(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        async with streaming(first, second, top()) as stream:
            for _ in range(5):
                first.faults[0] = raises(Unavailable("this shard failed to compute a step"))
                assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (len(first.requests), len(second.requests)) == (3, 5)

    async def test_only_replica_gets_sessions_although_they_fail(self) -> None:
        [bottom] = bottoms(1)
        async with streaming(bottom, top()) as stream:
            for _ in range(4):
                bottom.faults[0] = raises(Unavailable("this shard failed to compute a step"))
                assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert len(bottom.requests) == 8

    async def test_shard_that_refuses_the_gateway_is_named_in_the_log_alone(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        [bottom] = bottoms(1)
        bottom.faults[0] = raises(Forbidden("bottom-0 takes no laptop"))
        async with streaming(bottom, top(), max_failures=0) as stream:
            with pytest.raises(Unavailable) as caught:
                await stream.all()
        assert str(caught.value).endswith("after 0 tokens: a shard refuses the gateway")
        assert "shard bottom-0 refuses a session: PERMISSION_DENIED: bottom-0 takes no laptop" in caplog.text

    async def test_shards_that_do_not_fit_are_named_to_the_client_where_no_other_chain_is(self) -> None:
        [bottom] = bottoms(1)
        bottom.faults[0] = raises(Incompatible("the tokenizer of bottom-0 is a, that of top-0 is b"))
        async with streaming(bottom, top(), max_failures=0) as stream:
            with pytest.raises(Incompatible, match="the tokenizer of bottom-0 is a"):
                await stream.all()


class TestSameComputation:
    async def test_answer_does_not_continue_on_shards_that_compute_something_else(self) -> None:
        first, second = bottoms(2)
        above = top()
        hold = asyncio.Event()
        first.faults[2] = waits_for(hold)
        second.quantization = "int8"
        async with streaming(first, second, above, wait_seconds=0.0) as stream:
            answer = asyncio.create_task(stream.all())
            await eventually(lambda: not first.faults)
            # The others change to int8 as well, and the first one goes.
            above.quantization = "int8"
            await first.stop()
            await stream.refresh()
            with pytest.raises(Unavailable, match="after 2 tokens"):
                await answer
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert len(second.requests) == 1

    async def test_request_without_tokens_takes_what_the_shards_compute_now(self) -> None:
        first, second = bottoms(2)
        above = top()
        first.faults[0] = waits_for(asyncio.Event())
        second.quantization = "int8"
        async with streaming(first, second, above) as stream:
            answer = asyncio.create_task(stream.all())
            await eventually(lambda: not first.faults)
            above.quantization = "int8"
            await first.stop()
            await stream.refresh()
            assert ids(await answer) == [*SCRIPT, END_TOKEN]
