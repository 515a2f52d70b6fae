"""Tests of the token stream and of failover: with any fault the same tokens as without, each of them once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import count

import grpc
import pytest

from router_gateway.metrics import REPLAY_CAUSES, Metrics
from router_gateway.requests.failover import Failover, FailoverDependencies, RetryPolicy
from router_gateway.requests.stream import Step, StreamInput, TokenStream
from router_gateway.routing.router import RouteDecision
from router_gateway.shards.ejection import EjectionPolicy
from router_gateway.shards.placement import Placement
from router_gateway.shards.progress import ProgressMonitor
from router_gateway.shards.replica import Replica
from stitch.errors import Draining, Exhausted, Expired, Forbidden, Incompatible, OutOfStep, StitchError, Unavailable
from stitch.process import background_tasks
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2
from tests.support.fake_shard import (
    END_TOKEN,
    FakeShard,
    Fault,
    aborts,
    ends_stream_early,
    raises,
    waits_for,
)
from tests.support.registries import QUICK, registry_of
from tests.support.waiting import eventually

SCRIPT = [11, 12, 13, 14, 15, 16]
PROMPT = (5, 6, 7)
STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def stream_input(**sampling: int) -> StreamInput:
    filled = Sampling(stop_token_ids=(END_TOKEN,), **sampling)
    return StreamInput("id", PROMPT, RouteDecision("strong", 0.9, "", "content"), filled)


class StreamBench:
    """Streams over fake shards, with the metrics that they count."""

    def __init__(self, dependencies: FailoverDependencies, metrics: Metrics) -> None:
        self._dependencies = dependencies
        self._metrics = metrics

    def steps(self, given: StreamInput, deadline: float | None = None) -> aclosing[AsyncIterator[Step]]:
        failover = Failover(given.routes, self._dependencies, given.facts)
        return aclosing(TokenStream(given, failover, deadline, self._dependencies.clock).steps())

    async def all(self, given: StreamInput | None = None, deadline: float | None = None) -> list[Step]:
        async with self.steps(given or stream_input(), deadline) as steps:
            return [step async for step in steps]

    def replica(self, name: str) -> Replica:
        return self._dependencies.registry.replicas[name]

    async def refresh(self) -> None:
        await self._dependencies.registry.refresh()

    @property
    def drain_refusals(self) -> float | None:
        return self._metrics.registry.get_sample_value("stitch_drain_refusals_total")

    @property
    def replays(self) -> dict[str, float]:
        value = self._metrics.registry.get_sample_value
        counts = {cause: value("stitch_replays_total", {"cause": cause}) for cause in REPLAY_CAUSES}
        return {cause: count for cause, count in counts.items() if count}


@asynccontextmanager
async def streaming(
    *shards: FakeShard,
    wait_seconds: float = 5.0,
    max_failures: int = 5,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[StreamBench]:
    metrics = Metrics(["weak", "strong"], ["requested"])
    async with registry_of(*shards, metrics=metrics) as (_, registry):
        await registry.refresh()
        policy = RetryPolicy(wait_seconds=wait_seconds, first_pause_seconds=0.005, max_failures=max_failures)
        placement = Placement(registry)
        progress = ProgressMonitor(placement, QUICK, EjectionPolicy())
        dependencies = FailoverDependencies(registry, placement, metrics, policy, clock)
        async with background_tasks(progress.run()):
            yield StreamBench(dependencies, metrics)


def bottoms(count: int) -> list[FakeShard]:
    return [FakeShard(f"bottom-{index}", "bottom", SCRIPT) for index in range(count)]


def top() -> FakeShard:
    return FakeShard("top-0", "top")


def ids(steps: list[Step]) -> list[int]:
    return [token.id for step in steps for token in step.tokens]


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


@pytest.mark.parametrize(("max_tokens", "finish"), [(3, LENGTH), (50, STOP)])
async def test_finish_is_known_when_its_message_was_lost(max_tokens: int, finish: int) -> None:
    [bottom] = bottoms(1)
    bottom.omits_finish_reason = True
    async with streaming(bottom, top()) as stream:
        steps = await stream.all(stream_input(max_tokens=max_tokens))
    assert ids(steps) == [*SCRIPT, END_TOKEN][:max_tokens]
    assert steps[-1].finish == finish
    assert len(bottom.requests) == 1


async def test_new_request_on_a_full_shard_is_exhausted() -> None:
    [bottom] = bottoms(1)
    bottom.faults[0] = raises(Exhausted("no room", 2.5))
    async with streaming(bottom, top()) as stream:
        with pytest.raises(Exhausted) as caught:
            await stream.all()
    assert caught.value.retry_after_seconds == 2.5
    assert stream.replays == {}


async def test_begun_answer_waits_for_room() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = raises(Exhausted("no room", 9.0))
    async with streaming(first, second, top()) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"unavailable": 1}


async def test_begun_answer_without_room_is_exhausted_after_max_failures() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = raises(Exhausted("no room", 9.0))
    async with streaming(first, second, top(), max_failures=1) as stream:
        with pytest.raises(Exhausted):
            await stream.all()


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


class TestDraining:
    """A shard that began to drain between two polls refuses new sessions and keeps the running ones."""

    @pytest.mark.parametrize("role", ["bottom", "top"])
    async def test_refused_session_is_placed_on_another_chain_at_once(self, role: str) -> None:
        shards = [*bottoms(2), FakeShard("top-0", "top"), FakeShard("top-1", "top")]
        [draining] = [shard for shard in shards if shard.name == f"{role}-0"]
        draining.free_kv_tokens += 1
        async with streaming(*shards, max_failures=0) as stream:
            draining.draining = True
            if role == "top":
                # The first shard reports that the next one refuses.
                shards[0].faults[0] = raises(Draining("top-0 is draining"))
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (1, {})
            assert not stream.replica(draining.name).accepts_requests
            assert stream.replica(draining.name).serving

    async def test_refusal_counts_as_one_where_the_poll_shows_no_draining_shard(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[0] = raises(Draining("a shard of the chain is draining"))
        async with streaming(first, second, top(), max_failures=0) as stream:
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays, len(second.requests)) == (1, {}, 1)

    async def test_running_session_goes_on_and_new_one_is_placed_elsewhere(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        hold = asyncio.Event()
        first.faults[3] = waits_for(hold)
        async with streaming(first, second, top()) as stream:
            running = asyncio.create_task(stream.all())
            await eventually(lambda: first.running and not first.faults)
            first.draining = True
            await stream.refresh()
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert len(second.requests) == 1
            hold.set()
            assert ids(await running) == [*SCRIPT, END_TOKEN]
            assert (len(first.requests), stream.drain_refusals, stream.replays) == (1, 0, {})

    async def test_replay_is_not_placed_on_a_draining_replica(self) -> None:
        first, second, third = bottoms(3)
        first.free_kv_tokens += 2
        second.free_kv_tokens += 1
        first.faults[2] = aborts(UNAVAILABLE)
        async with streaming(first, second, third, top()) as stream:
            second.draining = True
            await stream.refresh()
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (len(second.requests), len(third.requests)) == (0, 1)
            assert stream.replays == {"unavailable": 1}

    async def test_replay_that_a_draining_replica_refuses_counts_once(self) -> None:
        first, second, third = bottoms(3)
        first.free_kv_tokens += 2
        second.free_kv_tokens += 1
        first.faults[2] = aborts(UNAVAILABLE)
        async with streaming(first, second, third, top()) as stream:
            second.draining = True
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (1, {"unavailable": 1})
            assert len(third.requests) == 1

    async def test_session_that_a_drain_cuts_is_a_replay(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[3] = aborts(UNAVAILABLE)
        async with streaming(first, second, top()) as stream:
            answer = stream.steps(stream_input())
            async with answer as steps:
                found = [await anext(aiter(steps))]
                first.draining = True
                found += [step async for step in steps]
            assert ids(found) == [*SCRIPT, END_TOKEN]
            assert (stream.drain_refusals, stream.replays) == (0, {"unavailable": 1})

    async def test_without_another_chain_the_client_gets_unavailable(self) -> None:
        [bottom] = bottoms(1)
        async with streaming(bottom, top(), wait_seconds=0.0) as stream:
            bottom.draining = True
            with pytest.raises(Unavailable, match="after 0 tokens: bottom-0 is shutting down"):
                await stream.all()
            with pytest.raises(Unavailable, match="no chain of route strong"):
                await stream.all()
            assert len(bottom.requests) == 1


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


class TestRoom:
    async def test_new_request_is_tried_on_another_chain(self) -> None:
        first, second = bottoms(2)
        first.free_kv_tokens += 1
        first.faults[0] = raises(Exhausted("no room", 2.5))
        async with streaming(first, second, top(), max_failures=0) as stream:
            assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
            assert stream.replays == {}
            assert not stream.replica("bottom-0").avoided

    async def test_new_request_is_refused_after_one_try_of_each_chain(self) -> None:
        shards = bottoms(3)
        for shard in shards:
            shard.faults[0] = raises(Exhausted("no room", 2.5))
        # However long the tries take: every look at the clock is a second later.
        async with streaming(*shards, top(), clock=count(1.0).__next__) as stream:
            with pytest.raises(Exhausted, match="no room"):
                await stream.all()
        assert [len(shard.requests) for shard in shards] == [1, 1, 1]

    async def test_kv_is_reserved_until_the_answer_ends(self) -> None:
        [bottom] = bottoms(1)
        hold = asyncio.Event()
        bottom.faults[2] = waits_for(hold)
        async with streaming(bottom, top()) as stream:
            answer = asyncio.create_task(stream.all(stream_input(max_tokens=50)))
            await eventually(lambda: not bottom.faults)
            assert stream.replica("top-0").load.free_tokens == 10_000 - len(PROMPT) - 50
            hold.set()
            await answer
            assert stream.replica("top-0").load.free_tokens == 10_000


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
