"""The Shard service: requests reach the engine, errors become statuses, and ended calls leave no session."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.engine.in_flight import MAX_UNANSWERED_STEPS
from stitch_server.engine.pass_age import TICK_SECONDS, PassAge
from stitch_server.rpc import link_server as link_server_module
from stitch_server.rpc import servicer as servicer_module
from stitch_server.rpc.handshake import PROTOCOL_VERSION
from stitch_server.rpc.servicer import PIECE_BYTES
from stitch_server.rpc.tensors import pack
from tests.support.engine_fakes import TOKEN_ID, WIDTH, ManualClock
from tests.support.weightless_shard import (
    CONTEXT_LENGTH,
    VOCABULARY_SIZE,
    Aborted,
    WeightlessShard,
    call_context,
    new_identity,
    stream,
)


def request(tokens: int = 5, **fields: Any) -> shard_pb2.ShardGenerateRequest:
    given = {
        "token_ids": range(tokens),
        "prompt_tokens": tokens,
        "route": "weak",
        "chain": ["top-0"],
        "sampling": inference_pb2.Sampling(max_tokens=3),
        **fields,
    }
    return shard_pb2.ShardGenerateRequest(**given)


def generate(
    shard: WeightlessShard, asked: shard_pb2.ShardGenerateRequest
) -> AsyncGenerator[shard_pb2.ShardGenerateResponse, None]:
    responses = shard.servicer.Generate(asked, call_context())
    assert isinstance(responses, AsyncGenerator)
    return responses


async def refused(shard: WeightlessShard, asked: shard_pb2.ShardGenerateRequest) -> Aborted:
    """The status of a call that is refused."""
    with pytest.raises(Aborted) as caught:
        await anext(generate(shard, asked))
    assert shard.idle
    return caught.value


@pytest.fixture
def first() -> WeightlessShard:
    return WeightlessShard(first=True)


@pytest.fixture
def last() -> WeightlessShard:
    return WeightlessShard(first=False)


class TestGenerate:
    async def test_tokens_stream_until_finish_reason(self, first: WeightlessShard) -> None:
        responses = [response async for response in generate(first, request())]
        tokens = [(one.id, one.position) for response in responses for one in response.tokens]
        assert tokens == [(TOKEN_ID, 5), (TOKEN_ID, 6), (TOKEN_ID, 7)]
        assert [one.finish_reason for one in responses] == [0, 0, inference_pb2.FINISH_REASON_LENGTH]
        assert first.idle

    async def test_first_token_has_stages(self, first: WeightlessShard) -> None:
        responses = [response async for response in generate(first, request())]
        assert {stage.name for stage in responses[0].stages} == {"queue", "bottom_prefill", "wire"}
        assert not responses[1].stages

    async def test_tokens_of_earlier_attempt_count(self, first: WeightlessShard) -> None:
        responses = [response async for response in generate(first, request(7, prompt_tokens=5))]
        assert len(responses) == 1
        assert responses[0].tokens[0].position == 7

    async def test_cancelled_waiting_call_leaves_nothing(self, first: WeightlessShard) -> None:
        first.engine.computes = False
        responses = generate(first, request())
        waiting = asyncio.ensure_future(anext(responses))
        await asyncio.sleep(0)
        assert first.waiting_sessions == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert first.idle

    async def test_cancelled_running_call_leaves_nothing(self, first: WeightlessShard) -> None:
        async with aclosing(generate(first, request(sampling=inference_pb2.Sampling(max_tokens=30)))) as responses:
            await anext(responses)
        assert first.idle

    async def test_shard_without_embedding_refuses_generate(self, last: WeightlessShard) -> None:
        error = await refused(last, request())
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "shard top-0 holds top layers without the embedding" in error.details

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            (
                {"token_ids": [], "prompt_tokens": 0},
                f"token_ids is '0 tokens', but there must be 1 to {CONTEXT_LENGTH - 1}",
            ),
            ({"token_ids": range(CONTEXT_LENGTH)}, f"token_ids is '{CONTEXT_LENGTH} tokens', but there must be 1 to"),
            ({"token_ids": [1, VOCABULARY_SIZE], "prompt_tokens": 1}, f"the vocabulary has {VOCABULARY_SIZE} tokens"),
            (
                {"sampling": inference_pb2.Sampling(logit_bias={1: 1.0, VOCABULARY_SIZE: 1.0})},
                f"sampling.logit_bias is {VOCABULARY_SIZE}, but the vocabulary has {VOCABULARY_SIZE} tokens",
            ),
            (
                {"sampling": inference_pb2.Sampling(forced_token_ids=[1, VOCABULARY_SIZE])},
                f"sampling.forced_token_ids is {VOCABULARY_SIZE}, but the vocabulary has {VOCABULARY_SIZE} tokens",
            ),
            (
                {"sampling": inference_pb2.Sampling(forced_token_ids=[1] * (CONTEXT_LENGTH + 1))},
                f"but it holds at most {CONTEXT_LENGTH}",
            ),
            ({"sampling": inference_pb2.Sampling(stop_token_ids=[1] * 2_049)}, "but it holds at most 2048"),
            ({"prompt_tokens": 0}, "prompt_tokens is 0, but it must be 1 to 5"),
            ({"prompt_tokens": 6}, "prompt_tokens is 6, but it must be 1 to 5"),
            ({"chain": []}, "chain is [], but after bottom-0 route weak passes top-0"),
            ({"chain": ["top-0", "top-0"]}, "but after bottom-0 route weak passes top-0"),
            ({"chain": ["127.0.0.1:1"]}, "chain is '127.0.0.1:1', but the cluster has: bottom-0, top-0"),
            ({"route": "medium"}, "route is 'medium', but this cluster has: weak, auto"),
            ({"sampling": inference_pb2.Sampling(temperature=-1.0)}, "sampling.temperature is -1.0"),
            ({"sampling": inference_pb2.Sampling(max_tokens=0)}, "sampling.max_tokens is 0"),
            ({"tenant_weight": 5e-324}, "tenant_weight is 5e-324, but it must be 0.01 to 100"),
            ({"tenant_weight": -1.0}, "tenant_weight is -1.0, but it must be 0.01 to 100"),
            ({"tenant_weight": math.nan}, "tenant_weight is nan, but it must be 0.01 to 100"),
        ],
    )
    async def test_invalid_request_is_refused_by_field(
        self, first: WeightlessShard, fields: dict[str, Any], said: str
    ) -> None:
        error = await refused(first, request(**fields))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in error.details

    async def test_bytes_that_are_no_message_are_refused(self, first: WeightlessShard) -> None:
        with pytest.raises(Aborted) as caught:
            await anext(aiter(first.servicer.Generate(None, call_context())))
        assert caught.value.details == "request is 'these bytes', but it must be a stitch.v1.ShardGenerateRequest"

    async def test_full_queue_is_resource_exhausted(self, first: WeightlessShard) -> None:
        first.engine.computes = False
        waiting = [asyncio.ensure_future(anext(generate(first, request()))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Aborted) as caught:
            await anext(generate(first, request()))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert first.idle


def hello(shard: str = "bottom-0", version: int = PROTOCOL_VERSION) -> shard_pb2.LinkRequest:
    greeting = shard_pb2.Hello(protocol_version=version, identity=new_identity(shard, "bottom"))
    return shard_pb2.LinkRequest(hello=greeting)


def step(session: int, length: int = 3, number: int = 1) -> shard_pb2.LinkRequest:
    """A session's first step."""
    rows = pack(torch.zeros(length, WIDTH), shard_pb2.DTYPE_FLOAT32)
    hidden = shard_pb2.HiddenStates(dtype=rows.dtype, tokens=length, hidden_size=WIDTH, data=rows.data)
    frame = shard_pb2.Step(step=number, hidden=hidden)
    opening = shard_pb2.NewSession(route="weak", token_ids=range(length), prompt_tokens=length)
    frame.segments.add(session=session, length=length, wants_token=True, new_session=opening)
    return shard_pb2.LinkRequest(step=frame)


def later_step(session: int, position: int, number: int) -> shard_pb2.LinkRequest:
    """A decode step of an open session."""
    request = step(session, length=1, number=number)
    request.step.segments[0].ClearField("new_session")
    request.step.segments[0].position = position
    return request


def link(
    shard: WeightlessShard, requests: AsyncIterator[shard_pb2.LinkRequest]
) -> AsyncGenerator[shard_pb2.LinkResponse, None]:
    responses = shard.servicer.Link(requests, call_context())
    assert isinstance(responses, AsyncGenerator)
    return responses


async def taken_from(queue: asyncio.Queue[shard_pb2.LinkRequest]) -> AsyncIterator[shard_pb2.LinkRequest]:
    while True:
        yield await queue.get()


async def talk(shard: WeightlessShard, *frames: shard_pb2.LinkRequest) -> list[shard_pb2.LinkResponse]:
    """All responses to these frames."""
    return [response async for response in link(shard, stream(frames))]


async def ended(shard: WeightlessShard, frames: Sequence[shard_pb2.LinkRequest]) -> Aborted:
    """The status with which the link ended; the shard keeps no session of it."""
    with pytest.raises(Aborted) as caught:
        await talk(shard, *frames)
    assert shard.idle
    return caught.value


class TestLink:
    async def test_matching_shard_is_welcomed(self, last: WeightlessShard) -> None:
        (welcome,) = await talk(last, hello())
        assert welcome.welcome.identity == last.identity

    async def test_steps_are_answered(self, last: WeightlessShard) -> None:
        frames = stream([hello(), step(5), step(6, number=2)], asyncio.Event())
        async with aclosing(link(last, frames)) as responses:
            _, first, second = [await anext(responses) for _ in range(3)]
        assert [(one.session, one.token.id, one.token.position) for one in first.reply.tokens] == [(5, TOKEN_ID, 3)]
        assert (first.reply.step, second.reply.step) == (1, 2)
        assert last.received_bytes == [3 * WIDTH * 4] * 2

    async def test_heartbeat_is_answered_until_pass_is_overdue(self, last: WeightlessShard) -> None:
        clock = ManualClock()
        last.engine.pass_age = age = PassAge(clock)
        asked: asyncio.Queue[shard_pb2.LinkRequest] = asyncio.Queue()
        asked.put_nowait(hello())
        heartbeat = shard_pb2.LinkRequest(heartbeat=shard_pb2.Heartbeat())
        async with aclosing(link(last, taken_from(asked))) as responses:
            await anext(responses)
            asked.put_nowait(heartbeat)
            assert (await anext(responses)).HasField("heartbeat")
            age.begin()
            age.end()
            age.tick()
            age.begin()
            while not age.is_overdue:
                clock.advance(TICK_SECONDS)
                age.tick()
            asked.put_nowait(heartbeat)
            asked.put_nowait(step(5))
            # Nothing came for the heartbeat.
            assert (await anext(responses)).HasField("reply")

    async def test_many_heartbeats_have_one_answer(self, last: WeightlessShard) -> None:
        heartbeat = shard_pb2.LinkRequest(heartbeat=shard_pb2.Heartbeat())
        frames = stream([hello(), *[heartbeat] * 100, step(5)], asyncio.Event())
        async with aclosing(link(last, frames)) as responses:
            kinds = [(await anext(responses)).WhichOneof("frame") for _ in range(3)]
        assert kinds == ["welcome", "heartbeat", "reply"]

    async def test_end_of_link_frees_its_sessions(self, last: WeightlessShard) -> None:
        end = asyncio.Event()
        async with aclosing(link(last, stream([hello(), step(5)], end))) as responses:
            await anext(responses)
            await anext(responses)
            assert last.running_sessions == 1
            end.set()
            assert await anext(responses, None) is None
        assert last.idle

    async def test_closed_session_is_freed(self, last: WeightlessShard) -> None:
        close = shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=[5]))
        running = list[int]()

        async def frames() -> AsyncIterator[shard_pb2.LinkRequest]:
            for frame in (hello(), step(5), step(6, number=2), close):
                yield frame
            running.append(last.running_sessions)

        assert [one async for one in link(last, frames())]
        assert running == [1]

    async def test_first_shard_refuses_link(self, first: WeightlessShard) -> None:
        error = await ended(first, [hello()])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details == "shard bottom-0 is the first of its chain: it has no upstream shard"

    @pytest.mark.parametrize("frames", [[], [step(5)], [shard_pb2.LinkRequest()]])
    async def test_link_without_hello_is_refused(
        self, last: WeightlessShard, frames: list[shard_pb2.LinkRequest]
    ) -> None:
        error = await ended(last, frames)
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details == "the first frame of a link must be a hello"

    async def test_other_protocol_version_is_refused(self, last: WeightlessShard) -> None:
        error = await ended(last, [hello(version=9), step(5)])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "protocol version" in error.details

    async def test_invalid_step_ends_link(self, last: WeightlessShard) -> None:
        broken = step(6, number=2)
        broken.step.hidden.data = b"abc"
        error = await ended(last, [hello(), step(5), broken])
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details.startswith("hidden.data is '3 bytes'")

    async def test_contradicting_frames_end_link(self, last: WeightlessShard) -> None:
        first_half, other = step(5), step(5)
        first_half.step.tokens_to_come = other.step.tokens_to_come = 1
        first_half.step.segments[0].length += 1
        error = await ended(last, [hello(), first_half, other])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION

    @pytest.mark.parametrize("frame", [hello(), shard_pb2.LinkRequest()])
    async def test_unexpected_frame_ends_link(self, last: WeightlessShard, frame: shard_pb2.LinkRequest) -> None:
        error = await ended(last, [hello(), step(5), frame])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details.endswith("came in the middle of a link")

    async def test_end_of_one_link_spares_another(self, last: WeightlessShard) -> None:
        async with aclosing(link(last, stream([hello(), step(5)], asyncio.Event()))) as responses:
            await anext(responses)
            await anext(responses)
            with pytest.raises(Aborted):
                await talk(last, hello(), step(5), hello())
            assert last.running_sessions == 1


async def reading_late(responses: AsyncIterator[object]) -> AsyncIterator[None]:
    """Reads responses after all frames have arrived, and yields at their end."""
    async for _ in responses:
        await asyncio.sleep(0.01)
    yield


class TestLinkLimits:
    """What one link, one upstream shard, and peers that say nothing can take."""

    async def test_link_without_hello_in_time_ends(
        self, last: WeightlessShard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servicer_module, "HELLO_SECONDS", 0.01)
        with pytest.raises(Aborted) as caught:
            await anext(link(last, stream([], asyncio.Event())))
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details == "no hello came within 0.01 s"

    async def test_silent_links_are_limited(self, last: WeightlessShard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(servicer_module, "MAX_SILENT_LINKS", 2)
        servicer, end = last.servicer, asyncio.Event()
        silent = [asyncio.ensure_future(anext(servicer.Link(stream([], end), call_context()))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Aborted) as caught:
            await anext(servicer.Link(stream([hello()]), call_context()))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        end.set()
        await asyncio.gather(*silent, return_exceptions=True)
        assert (await anext(servicer.Link(stream([hello()]), call_context()))).HasField("welcome")

    async def test_links_of_one_shard_are_limited(self, last: WeightlessShard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(servicer_module, "MAX_LINKS", 2)
        servicer, end = last.servicer, asyncio.Event()
        links = [servicer.Link(stream([hello()], end), call_context()) for _ in range(3)]
        for one in links[:2]:
            await anext(one)
        with pytest.raises(Aborted) as caught:
            await anext(links[2])
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details == "shard bottom-0 has 2 links to top-0, which is the limit"
        end.set()
        assert await anext(links[0], None) is None
        assert (await anext(servicer.Link(stream([hello()]), call_context()))).HasField("welcome")

    @pytest.mark.parametrize("shard", ["bottom-1", "top-0", "x\n" * 1_000])
    async def test_shard_that_the_cluster_lacks_is_refused(self, last: WeightlessShard, shard: str) -> None:
        error = await ended(last, [hello(shard)])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details.endswith("with bottom layers 0 to 4 is not in the cluster of top-0")
        assert error.details.isprintable()
        assert len(error.details) < 200

    async def test_sessions_of_a_link_are_limited(self, last: WeightlessShard, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_server_module, "MAX_SESSIONS", 2)
        close = shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=[5]))
        fine = [hello(), step(5), step(6, number=2), close, step(7, number=3), step(7, number=4)]
        await talk(last, *fine)
        assert len(last.received_bytes) == 4
        error = await ended(last, [*fine, step(8, number=5)])
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details == "2 sessions are open over this link, which is the limit"

    async def test_sessions_that_are_not_open_are_not_closed(self, last: WeightlessShard) -> None:
        closed: list[Sequence[int]] = []
        assert last.next_stage is not None
        last.next_stage.close = lambda upstream, session_ids: closed.append(session_ids)  # type: ignore[method-assign]
        closes = [
            shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=sessions))
            for sessions in (range(1_000), [7, 5, 9], [5])
        ]
        await talk(last, hello(), closes[0], step(5), closes[1], closes[2])
        assert closed == [[5]]

    async def test_window_of_a_peer_that_reads_no_replies_stays_full(self, last: WeightlessShard) -> None:
        steps = [step(1, number=number) for number in range(2 * MAX_UNANSWERED_STEPS + 2)]
        responses = link(last, stream([hello(), *steps], asyncio.Event()))
        await anext(responses)
        with pytest.raises(Aborted) as caught:
            await anext(reading_late(responses))
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "others are not answered, which is the limit" in caught.value.details

    async def test_prefixes_are_shared_within_a_link_where_nobody_is_certified(self, last: WeightlessShard) -> None:
        scopes = []
        assert last.next_stage is not None
        last.next_stage.on_upstream_lost = lambda upstream: scopes.append(upstream.prefix_scope)  # type: ignore[method-assign]
        for _ in range(2):
            await talk(last, hello())
        assert [scope.partition("/")[0] for scope in scopes] == ["bottom-0", "bottom-0"]
        assert len(set(scopes)) == 2


class TestDescribe:
    async def test_describe_reports_free_tokens_and_sessions(self, first: WeightlessShard) -> None:
        first.engine.computes = False
        waiting = asyncio.ensure_future(anext(generate(first, request())))
        await asyncio.sleep(0)
        described = await first.servicer.Describe(shard_pb2.ShardDescribeRequest(), call_context())
        assert described.identity == first.identity
        assert (described.kv_free_tokens, described.running_sessions, described.waiting_sessions) == (128, 0, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


class TestDraining:
    """A draining shard refuses new sessions, finishes the running ones, and knows when they have ended."""

    async def test_generate_is_refused_as_draining(self, first: WeightlessShard) -> None:
        first.start_draining()
        error = await refused(first, request())
        assert (error.code, error.details) == (grpc.StatusCode.UNAVAILABLE, "shard bottom-0 is shutting down")

    async def test_running_generation_continues_and_then_leaves_tracker(self, first: WeightlessShard) -> None:
        responses = generate(first, request(sampling=inference_pb2.Sampling(max_tokens=30)))
        await anext(responses)
        first.start_draining()
        waiting = asyncio.ensure_future(first.in_flight.wait_until_empty())
        assert len([one async for one in responses]) == 29
        await asyncio.wait_for(waiting, 5.0)

    async def test_new_session_of_link_is_refused_alone(self, last: WeightlessShard) -> None:
        end = asyncio.Event()
        frames = asyncio.Queue[shard_pb2.LinkRequest]()

        async def requests() -> AsyncIterator[shard_pb2.LinkRequest]:
            while not end.is_set():
                yield await frames.get()

        for frame in (hello(), step(5)):
            frames.put_nowait(frame)
        async with aclosing(link(last, requests())) as responses:
            await anext(responses)
            assert len((await anext(responses)).reply.tokens) == 1
            last.start_draining()
            frames.put_nowait(step(6, number=2))
            refusal = (await anext(responses)).reply
            assert [(one.session, one.cause) for one in refusal.failures] == [(6, shard_pb2.FAILURE_CAUSE_DRAINING)]
            frames.put_nowait(later_step(5, position=3, number=3))
            assert [one.session for one in (await anext(responses)).reply.tokens] == [5]
            waiting = asyncio.ensure_future(last.in_flight.wait_until_empty())
            await asyncio.sleep(0)
            assert not waiting.done()
            end.set()
            frames.put_nowait(shard_pb2.LinkRequest(close=shard_pb2.CloseSessions(sessions=[5, 6])))
            await asyncio.wait_for(waiting, 5.0)

    async def test_lost_link_leaves_tracker(self, last: WeightlessShard) -> None:
        await talk(last, hello(), step(5))
        await asyncio.wait_for(last.in_flight.wait_until_empty(), 5.0)

    async def test_describe_reports_draining(self, last: WeightlessShard) -> None:
        described = [await last.servicer.Describe(shard_pb2.ShardDescribeRequest(), call_context())]
        last.start_draining()
        described.append(await last.servicer.Describe(shard_pb2.ShardDescribeRequest(), call_context()))
        assert [one.draining for one in described] == [False, True]


class TestTokenizer:
    async def test_tokenizer_files_are_sent_in_pieces(self, first: WeightlessShard, tmp_path: Path) -> None:
        contents = {"tokenizer.json": bytes(range(256)) * 2048, "config.json": b"{}", "empty.json": b""}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            first.tokenizer_files.append(tmp_path / name)
        fetched: dict[str, bytes] = {}
        pieces = first.servicer.FetchTokenizer(shard_pb2.FetchTokenizerRequest(), call_context())
        async for piece in pieces:
            assert len(piece.data) <= PIECE_BYTES
            fetched[piece.file] = fetched.get(piece.file, b"") + piece.data
        assert fetched == contents
