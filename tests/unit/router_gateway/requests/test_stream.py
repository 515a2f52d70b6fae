"""One session over as many chains as it takes: the same tokens as without a fault, each of them once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import grpc
import pytest

from router_gateway.metrics import REPLAY_CAUSES, Metrics
from router_gateway.requests.failover import Failover, FailoverDependencies, RetryPolicy
from router_gateway.requests.preparation import Prepared
from router_gateway.requests.stream import Step, TokenStream
from router_gateway.requests.types import FinishReason, Request, Stage
from router_gateway.routing.router import RouteDecision
from router_gateway.shards.placement import Placement
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.errors import Exhausted, Expired, Incompatible, StitchError, Unavailable
from stitch.sampling import Sampling
from tests.support.byte_tokenizer import tokenizer_files
from tests.support.fake_shard import END_TOKEN, FakeShard, Fault, aborts, cuts_short, is_full, waits_for
from tests.support.fleets import fleet_of
from tests.support.waiting import eventually

SCRIPT = [11, 12, 13, 14, 15, 16]
PROMPT = (5, 6, 7)
VOCABULARY = Vocabulary.from_files(tokenizer_files())
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def prepared(**sampling: int) -> Prepared:
    request = Request("id", "prompt", Sampling())
    filled = Sampling(stop_token_ids=(END_TOKEN,), **sampling)
    return Prepared(request, PROMPT, RouteDecision("strong", 0.9, "", "content"), filled, VOCABULARY)


def routes_of(what: Prepared) -> tuple[str, ...]:
    return (what.decision.route,) if isinstance(what.decision, RouteDecision) else what.decision.routes


class Running:
    """A stream in front of fake shards, with what it counts."""

    def __init__(self, around: FailoverDependencies, metrics: Metrics) -> None:
        self._around = around
        self._metrics = metrics

    def steps(self, what: Prepared, deadline: float | None = None) -> aclosing[AsyncIterator[Step]]:
        resumption = Failover(routes_of(what), self._around)
        return aclosing(TokenStream(what, resumption, deadline, self._around.clock).steps())

    async def all(self, what: Prepared | None = None, deadline: float | None = None) -> list[Step]:
        async with self.steps(what or prepared(), deadline) as steps:
            return [step async for step in steps]

    async def refresh(self) -> None:
        await self._around.fleet.refresh()

    @property
    def replays(self) -> dict[str, float]:
        value = self._metrics.registry.get_sample_value
        counts = {cause: value("stitch_replays_total", {"cause": cause}) for cause in REPLAY_CAUSES}
        return {cause: count for cause, count in counts.items() if count}


@asynccontextmanager
async def streaming(
    *shards: FakeShard,
    wait_seconds: float = 5.0,
    most_losses: int = 5,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Running]:
    async with fleet_of(*shards) as (cluster, fleet):
        await fleet.refresh()
        metrics = Metrics(["weak", "strong"], ["requested"])
        persistence = RetryPolicy(wait_seconds, first_pause_seconds=0.005, most_losses=most_losses)
        around = FailoverDependencies(fleet, Placement(cluster, fleet), metrics.replays, persistence, clock)
        yield Running(around, metrics)


def bottoms(count: int) -> list[FakeShard]:
    return [FakeShard(f"bottom-{index}", "bottom", SCRIPT) for index in range(count)]


def top() -> FakeShard:
    return FakeShard("top-0", "top")


def ids(steps: list[Step]) -> list[int]:
    return [token.id for step in steps for token in step.tokens]


async def test_tokens_come_one_by_one_up_to_the_end_token() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top()) as stream:
        steps = await stream.all()
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert [step.finish for step in steps] == [None] * 6 + [FinishReason.STOP]
    assert steps[0].stages == (Stage("bottom_prefill", 0.25),)
    assert steps[1].stages == ()
    assert stream.replays == {}


async def test_the_shard_gets_everything_that_it_needs() -> None:
    [bottom], above = bottoms(1), top()
    async with streaming(bottom, above) as stream:
        await stream.all(prepared(seed=9, max_tokens=2))
    [request] = bottom.requests
    assert list(request.token_ids) == list(PROMPT)
    assert (request.prompt_tokens, request.route, list(request.chain)) == (3, "strong", [above.place.address])
    assert Sampling.from_proto(request.sampling) == Sampling(seed=9, max_tokens=2, stop_token_ids=(END_TOKEN,))


async def test_max_tokens_end_with_length() -> None:
    async with streaming(*bottoms(1), top()) as stream:
        steps = await stream.all(prepared(max_tokens=3))
    assert ids(steps) == SCRIPT[:3]
    assert steps[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("before_token", [0, 1, 4])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (aborts(UNAVAILABLE), "unavailable"),
        (aborts(grpc.StatusCode.CANCELLED), "cancelled"),
        (aborts(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), "unavailable"),
        (cuts_short, "cut"),
    ],
)
async def test_a_lost_chain_is_replaced_without_a_trace(before_token: int, fault: Fault, cause: str) -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[before_token] = fault
    async with streaming(first, second, top()) as stream:
        steps = await stream.all(prepared(seed=4))
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {cause: 1}
    [again] = second.requests
    assert list(again.token_ids) == [*PROMPT, *SCRIPT[:before_token]]
    assert again.prompt_tokens == len(PROMPT)
    assert again.sampling.seed == 4


async def test_a_token_at_a_wrong_position_never_arrives() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.position_error = 1
    async with streaming(first, second, top()) as stream:
        steps = await stream.all()
    assert ids(steps) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"out_of_step": 1}


async def test_the_only_chain_is_tried_again_and_again() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {2: aborts(UNAVAILABLE), 3: aborts(UNAVAILABLE)}
    async with streaming(bottom, top()) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"unavailable": 2}


async def test_an_answer_waits_for_its_shard_to_come_back() -> None:
    [bottom], above = bottoms(1), top()
    hold = asyncio.Event()
    bottom.faults[2] = waits_for(hold)
    async with streaming(bottom, above) as stream:
        answer = asyncio.create_task(stream.all())
        await eventually(lambda: bottom.running)
        await bottom.stop()
        await bottom.start()
        assert ids(await answer) == [*SCRIPT, END_TOKEN]


async def test_a_silent_shard_is_left_for_another() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[3] = waits_for(asyncio.Event())
    async with streaming(first, second, top()) as stream:
        answer = asyncio.create_task(stream.all())
        await eventually(lambda: first.running and not first.faults)
        first.talks.clear()
        await stream.refresh()
        assert ids(await answer) == [*SCRIPT, END_TOKEN]
        assert stream.replays == {"unreachable": 1}
        await eventually(lambda: first.cancelled)
        first.talks.set()


async def test_no_chain_left_says_how_far_it_came() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {4: aborts(UNAVAILABLE, "burnt down")}
    async with streaming(bottom, top(), most_losses=0) as stream:
        with pytest.raises(Unavailable, match="after 4 tokens: burnt down") as caught:
            await stream.all()
    assert caught.value.generated_tokens == 4


async def test_waiting_has_an_end() -> None:
    now = [0.0]

    async def burns_down(context: object) -> None:
        now[0] = 100.0
        await aborts(UNAVAILABLE)(context)  # type: ignore[arg-type]

    [bottom] = bottoms(1)
    bottom.faults = {1: burns_down}
    above = top()
    async with streaming(bottom, above, wait_seconds=0.0, clock=lambda: now[0]) as stream:
        with pytest.raises(Unavailable) as caught:
            await stream.all()
    assert caught.value.generated_tokens == 1


async def test_without_any_chain_a_new_request_does_not_wait() -> None:
    [bottom], above = bottoms(1), top()
    async with streaming(bottom, above, wait_seconds=1e9) as stream:
        await above.stop()
        await stream.refresh()
        with pytest.raises(Unavailable) as caught:
            await stream.all()
    assert caught.value.generated_tokens == 0
    assert bottom.requests == []


async def test_a_session_that_kills_its_shard_does_not_kill_every_shard() -> None:
    shards = bottoms(6)
    for shard in shards:
        shard.faults[1] = aborts(UNAVAILABLE)
    async with streaming(*shards, top(), most_losses=2) as stream:
        with pytest.raises(Unavailable):
            await stream.all()
    assert sum(len(shard.requests) for shard in shards) == 3


async def test_new_tokens_make_the_count_begin_anew() -> None:
    [bottom] = bottoms(1)
    bottom.faults = {index: aborts(UNAVAILABLE) for index in range(1, 6)}
    async with streaming(bottom, top(), most_losses=1) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]


@pytest.mark.parametrize(("max_tokens", "finish"), [(3, FinishReason.LENGTH), (50, FinishReason.STOP)])
async def test_an_end_that_got_lost_is_known_all_the_same(max_tokens: int, finish: FinishReason) -> None:
    [bottom] = bottoms(1)
    bottom.forgets_the_end = True
    async with streaming(bottom, top()) as stream:
        steps = await stream.all(prepared(max_tokens=max_tokens))
    assert ids(steps) == [*SCRIPT, END_TOKEN][:max_tokens]
    assert steps[-1].finish is finish
    assert len(bottom.requests) == 1


async def test_a_full_shard_sends_a_new_request_away_with_a_time() -> None:
    [bottom] = bottoms(1)
    bottom.faults[0] = is_full(2.5)
    async with streaming(bottom, top()) as stream:
        with pytest.raises(Exhausted) as caught:
            await stream.all()
    assert caught.value.retry_after_seconds == 2.5
    assert stream.replays == {}


async def test_half_an_answer_waits_for_room() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = is_full(9.0)
    async with streaming(first, second, top()) as stream:
        assert ids(await stream.all()) == [*SCRIPT, END_TOKEN]
    assert stream.replays == {"unavailable": 1}


async def test_half_an_answer_without_room_ends_with_the_time() -> None:
    first, second = bottoms(2)
    first.free_kv_tokens += 1
    first.faults[2] = aborts(UNAVAILABLE)
    second.faults[2] = is_full(9.0)
    async with streaming(first, second, top(), most_losses=1) as stream:
        with pytest.raises(Exhausted):
            await stream.all()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, Incompatible),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Expired),
        (grpc.StatusCode.INTERNAL, StitchError),
        (grpc.StatusCode.INVALID_ARGUMENT, StitchError),
    ],
)
async def test_what_another_shard_would_say_too_is_passed_on(code: grpc.StatusCode, kind: type[StitchError]) -> None:
    first, second = bottoms(2)
    for shard in (first, second):
        shard.faults[0] = aborts(code, "as it is")
    async with streaming(first, second, top()) as stream:
        with pytest.raises(kind, match="as it is"):
            await stream.all()
    assert len(first.requests) + len(second.requests) == 1


async def test_the_deadline_goes_along_as_what_is_left_of_it() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top(), clock=lambda: 1_000.0) as stream:
        await stream.all(deadline=1_030.0)
        await stream.all()
    with_deadline, without = bottom.deadlines
    assert with_deadline is not None
    assert 0 < with_deadline < 31
    assert without is None


async def test_behind_the_deadline_no_shard_is_asked() -> None:
    [bottom] = bottoms(1)
    async with streaming(bottom, top(), clock=lambda: 1_000.0) as stream:
        with pytest.raises(Expired, match="after 0 tokens"):
            await stream.all(deadline=999.0)
    assert bottom.requests == []


async def test_closing_the_stream_cancels_the_session() -> None:
    [bottom] = bottoms(1)
    bottom.faults[2] = waits_for(asyncio.Event())
    async with streaming(bottom, top()) as stream:
        async with stream.steps(prepared()) as steps:
            await anext(aiter(steps))
            assert bottom.running == 1
        await eventually(lambda: bottom.cancelled == 1 and bottom.running == 0)


async def test_cancelling_whoever_reads_cancels_the_session() -> None:
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
