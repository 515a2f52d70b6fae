"""Steps and replies survive a round trip through frames; invalid frames are refused before anything is kept."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from stitch.channels import MAX_FRAME_BYTES
from stitch.errors import InvalidRequest, OutOfStep
from stitch.sampling import Sampling, Token, TokenLogprobs
from stitch.v1 import shard_pb2
from stitch_server.engine.request import Request
from stitch_server.engine.types import (
    IncomingStep,
    LayerRange,
    OutgoingStep,
    Segment,
    SessionFailure,
    SessionToken,
    StepReply,
)
from stitch_server.rpc.frames import (
    FRAME_BYTES,
    MAX_FAILURE_CHARACTERS,
    MAX_SEGMENTS,
    MAX_STAGE_CHARACTERS,
    MAX_STAGES,
    StepAssembler,
    StepLimits,
    reply_frame,
    reply_of,
    step_frames,
)
from stitch_server.rpc.tensors import DTYPES, Packed, pack, unpack
from tests.support.engine_fakes import new_request

WIDTH = 1024
LIMITS = StepLimits(max_prefill_tokens=4096, max_bytes=32 << 20)
MAX_TOKENS = 4096 + MAX_SEGMENTS


def new_step(
    *lengths: int,
    number: int = 1,
    sessions: list[Request] | None = None,
    opens: bool = False,
    pipelined: bool = False,
) -> OutgoingStep:
    """A step of segments of these lengths, at position 3, with random rows."""
    sessions = sessions or [new_request() for _ in lengths]
    segments = tuple(
        Segment(session, LayerRange(0, 1), 3, length, wants_token=length > 1, blocks=[])
        for session, length in zip(sessions, lengths, strict=True)
    )
    rows = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(number))
    return OutgoingStep(number, segments, (opens,) * len(lengths), rows, pipelined, urgent=False)


def frames_of(step: OutgoingStep, dtype: str = "float32") -> list[shard_pb2.Step]:
    """The step's frames, serialized and parsed."""
    sent = [frame.SerializeToString() for frame in step_frames(step, pack(step.hidden, DTYPES[dtype][0]))]
    assert all(len(frame) <= MAX_FRAME_BYTES for frame in sent)
    return [shard_pb2.LinkRequest.FromString(frame).step for frame in sent]


def unpacked(packed: Packed) -> Tensor:
    return unpack(packed, torch.device("cpu"), torch.float32)


def assembler(dtype: str = "float32") -> StepAssembler:
    return StepAssembler(WIDTH, DTYPES[dtype][0], LIMITS, unpacked)


def only(frames: list[shard_pb2.Step], into: StepAssembler) -> IncomingStep:
    """The step that the last of these frames completes."""
    finished = [into.add(frame) for frame in frames]
    assert finished[:-1] == [None] * (len(frames) - 1)
    assert finished[-1] is not None
    return finished[-1]


class TestSteps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (64,), (65,), (1, 300, 2), (1000,)])
    def test_step_survives_round_trip(self, lengths: tuple[int, ...], dtype: str) -> None:
        step = new_step(*lengths, pipelined=True)
        arrived = only(frames_of(step, dtype), assembler(dtype))
        assert (arrived.number, arrived.pipelined) == (1, True)
        assert torch.equal(arrived.hidden(), unpacked(pack(step.hidden, DTYPES[dtype][0])))
        assert [(one.session_id, one.epoch, one.position, one.length) for one in arrived.segments] == [
            (one.session.id, 0, 3, one.length) for one in step.segments
        ]
        assert [one.wants_token for one in arrived.segments] == [one.wants_token for one in step.segments]
        assert all(one.new_session is None for one in arrived.segments)

    def test_step_is_split_between_rows(self) -> None:
        frames = frames_of(new_step(100))
        assert [frame.hidden.tokens for frame in frames] == [64, 36]
        assert [frame.tokens_to_come for frame in frames] == [36, 0]
        assert all(len(frame.hidden.data) <= FRAME_BYTES for frame in frames)

    def test_row_larger_than_frame_gets_own_frame(self) -> None:
        step = new_step(2)
        wide = torch.zeros(2, FRAME_BYTES // 4 + 1)
        step = OutgoingStep(1, step.segments, step.opens, wide, pipelined=False, urgent=False)
        assert [frame.hidden.tokens for frame in frames_of(step)] == [1, 1]

    def test_segment_travels_in_the_frame_of_its_first_row(self) -> None:
        assert [len(frame.segments) for frame in frames_of(new_step(1, 99, 50))] == [2, 1, 0]

    def test_openings_of_long_prompts_travel_in_several_frames(self) -> None:
        sessions = [new_request(100_000) for _ in range(5)]
        step = new_step(1, 1, 1, 1, 70, sessions=sessions, opens=True)
        frames = frames_of(step)
        assert [(len(frame.segments), frame.hidden.tokens) for frame in frames] == [(1, 1)] * 4 + [(1, 64), (0, 6)]
        arrived = only(frames, assembler())
        assert [len(one.new_session.token_ids) for one in arrived.segments if one.new_session] == [100_000] * 5
        assert torch.equal(arrived.hidden(), step.hidden)

    def test_new_session_carries_route_chain_tenant_sampling_and_tokens(self) -> None:
        sampling = Sampling(temperature=0.5, top_k=3, seed=9, max_tokens=7, stop_token_ids=(1, 2), logprobs=2)
        session = new_request(5, "strong", chain=("a", "b", "c"), prompt_tokens=4, tenant="acme")
        session.sampling, session.reused, session.expected_tokens = sampling, 16, 90
        (received,) = only(frames_of(new_step(2, sessions=[session], opens=True)), assembler()).segments
        assert received.new_session is not None
        opened = received.new_session
        assert (opened.route, opened.chain, opened.tenant) == ("strong", ("b", "c"), "acme")
        assert (opened.sampling, opened.expected_tokens) == (sampling, 90)
        assert (opened.token_ids, opened.prompt_tokens, opened.reused) == ([0, 1, 2, 3, 4], 4, 16)
        assert (opened.cached, opened.epoch) == (16, session.epoch)

    @pytest.mark.parametrize("seed", range(5))
    def test_frames_of_several_steps_may_interleave(self, seed: int) -> None:
        steps = {number: new_step(number * 90, 2, number=number) for number in range(1, 5)}
        queues = [frames_of(step) for step in steps.values()]
        draw, into, arrived = random.Random(seed), assembler(), list[IncomingStep]()
        while queues:
            queue = draw.choice(queues)
            if (step := into.add(queue.pop(0))) is not None:
                arrived.append(step)
            queues = [one for one in queues if one]
        assert sorted(step.number for step in arrived) == [1, 2, 3, 4]
        assert all(torch.equal(step.hidden(), steps[step.number].hidden) for step in arrived)

    def test_step_number_may_repeat_after_its_reply(self) -> None:
        into = assembler()
        for _ in range(2):
            assert only(frames_of(new_step(100)), into).hidden().shape == (100, WIDTH)
            into.answered(1)


class TestRefusals:
    def refused(self, *frames: shard_pb2.Step, into: StepAssembler | None = None) -> InvalidRequest:
        into = into or assembler()
        for frame in frames[:-1]:
            into.add(frame)
        with pytest.raises(InvalidRequest) as caught:
            into.add(frames[-1])
        assert into._incomplete.keys() <= {frame.step for frame in frames[:-1]}
        return caught.value

    def frame(self, *lengths: int) -> shard_pb2.Step:
        return frames_of(new_step(*lengths))[0]

    def test_step_without_tokens_is_refused(self) -> None:
        assert self.refused(shard_pb2.Step(step=1)).field == "hidden.dtype"
        empty = shard_pb2.HiddenStates(dtype=DTYPES["float32"][0], hidden_size=WIDTH)
        error = self.refused(shard_pb2.Step(step=1, hidden=empty))
        assert (error.field, error.value) == ("step.hidden.tokens", 0)

    def test_frame_without_tokens_is_refused(self) -> None:
        first, second = frames_of(new_step(100))
        second.hidden.tokens, second.hidden.data, second.tokens_to_come = 0, b"", 36
        assert self.refused(first, second).field == "step.hidden.tokens"

    def test_bytes_that_contradict_shape_are_refused(self) -> None:
        frame = self.frame(5)
        frame.hidden.data = frame.hidden.data[:-1]
        assert self.refused(frame).field == "hidden.data"

    def test_other_dtype_is_refused(self) -> None:
        assert self.refused(self.frame(5), into=assembler("int8")).field == "hidden.dtype"

    def test_other_hidden_size_is_refused(self) -> None:
        frame = self.frame(5)
        frame.hidden.hidden_size = 7
        assert self.refused(frame).field == "hidden.hidden_size"

    def test_step_above_max_tokens_is_refused(self) -> None:
        frame = self.frame(100)
        frame.tokens_to_come = MAX_TOKENS
        error = self.refused(frame)
        assert (error.field, error.value) == ("step.hidden.tokens", 64 + MAX_TOKENS)
        assert str(MAX_TOKENS) in error.limit

    @pytest.mark.parametrize("length", [4, 6])
    def test_segments_that_contradict_rows_are_refused(self, length: int) -> None:
        frame = self.frame(5)
        frame.segments[0].length = length
        error = self.refused(frame)
        assert (error.field, error.value) == ("step.segments", f"{length} tokens in 1 segments")

    def test_row_without_segment_is_refused(self) -> None:
        first, second = frames_of(new_step(64, 10))
        second.ClearField("segments")
        error = self.refused(first, second)
        assert (error.field, error.limit) == ("step.segments", "74 of the step's 74 have come")

    def test_prefill_above_limit_is_refused(self) -> None:
        into = StepAssembler(WIDTH, DTYPES["float32"][0], StepLimits(10, 16 << 20), unpacked)
        assert only(frames_of(new_step(11, 1, 1)), into)
        error = self.refused(*frames_of(new_step(11, 2, number=2)), into=into)
        assert str(error) == (
            "step.segments is '13 tokens in 2 segments', but besides one token a segment, 10 are the limit"
        )

    def test_too_many_segments_are_refused(self) -> None:
        frame = shard_pb2.Step(step=1, hidden=shard_pb2.HiddenStates(dtype=DTYPES["float32"][0], hidden_size=WIDTH))
        frame.hidden.tokens, frame.tokens_to_come, frame.hidden.data = 1, MAX_SEGMENTS, b"\0" * WIDTH * 4
        frame.segments.extend(shard_pb2.Segment(session=one, length=1) for one in range(MAX_SEGMENTS + 1))
        assert str(MAX_SEGMENTS) in self.refused(frame).limit

    def test_segment_without_tokens_is_refused(self) -> None:
        frame = self.frame(5)
        frame.segments.add(session=9)
        assert self.refused(frame).field == "step.segments.length"

    def test_later_frame_without_first_one_is_refused(self) -> None:
        assert self.refused(frames_of(new_step(100))[1]).field == "step.segments"

    def test_sampling_outside_limits_is_refused(self) -> None:
        frame = frames_of(new_step(5, opens=True))[0]
        frame.segments[0].new_session.sampling.temperature = -1.0
        assert self.refused(frame).field == "sampling.temperature"

    @pytest.mark.parametrize("to_come", [35, 37, 0])
    def test_frame_with_wrong_tokens_to_come_is_refused(self, to_come: int) -> None:
        into, frames = assembler(), frames_of(new_step(164))
        into.add(frames[0])
        frames[1].tokens_to_come = to_come
        with pytest.raises(OutOfStep, match=f"step 1 has 100 tokens to come, .* 64 and announces {to_come} more"):
            into.add(frames[1])

    def test_too_many_unanswered_steps_are_refused(self) -> None:
        into, frame = assembler(), self.frame(1)
        for number in range(LIMITS.max_steps):
            frame.step = number
            assert into.add(frame) is not None
        frame.step = LIMITS.max_steps
        limit = f"step {LIMITS.max_steps} begins while {LIMITS.max_steps} others are not answered, which is the limit"
        with pytest.raises(OutOfStep, match=limit):
            into.add(frame)
        into.answered(0)
        assert into.add(frame) is not None

    def test_bytes_above_window_are_refused_before_they_come(self) -> None:
        window = 1000 * WIDTH * 4
        into = StepAssembler(WIDTH, DTYPES["float32"][0], StepLimits(4096, window), unpacked)
        first, second = (frames_of(new_step(900, number=number))[0] for number in (1, 2))
        assert into.add(first) is None
        with pytest.raises(OutOfStep, match=f"step 2 takes the unanswered steps of its link over {window} bytes"):
            into.add(second)
        into.answered(1)
        assert into.add(second) is None

    def test_step_that_is_not_answered_cannot_begin_again(self) -> None:
        into = assembler()
        assert into.add(self.frame(1)) is not None
        with pytest.raises(OutOfStep, match="step 1 begins again before it is answered"):
            into.add(self.frame(1))

    def test_repeated_frame_is_refused(self) -> None:
        into, (first, *_) = assembler(), frames_of(new_step(100))
        into.add(first)
        with pytest.raises(OutOfStep):
            into.add(first)


class TestReplies:
    def roundtrip(self, reply: StepReply) -> StepReply:
        sent = reply_frame(reply).SerializeToString()
        return reply_of(shard_pb2.LinkResponse.FromString(sent).reply)

    def test_empty_reply_survives_round_trip(self) -> None:
        assert self.roundtrip(StepReply(3)) == StepReply(3)

    def test_full_reply_survives_round_trip(self) -> None:
        logprobs = TokenLogprobs(-0.5, ((7, -0.5), (9, -1.25)))
        reply = StepReply(
            step=4,
            tokens=(SessionToken(1, 0, Token(7, 20, logprobs)), SessionToken(2, 3, Token(0, 0))),
            failures=(SessionFailure(5, 1, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, "no block"),),
            stages={"queue": 0.5, "sample": 0.25},
            kv_free_tokens=0,
        )
        assert self.roundtrip(reply) == reply

    def test_words_and_figures_of_a_peer_are_bounded(self) -> None:
        said = "no block\n2026-01-01 ERROR stitch: forged" + "x" * 100_000
        failures = (SessionFailure(5, 1, shard_pb2.FAILURE_CAUSE_KV_EXHAUSTED, said),)
        stages = {"wire": math.nan, "queue": -1.0, "stitch": math.inf, "sample": 0.5, "y" * 1_000: 0.25}
        arrived = self.roundtrip(StepReply(4, failures=failures, stages=stages))
        assert arrived.failures[0].message.startswith(r"no block\n2026-01-01 ERROR stitch: forgedx")
        assert len(arrived.failures[0].message) <= MAX_FAILURE_CHARACTERS + 1
        assert arrived.stages == {"sample": 0.5, f"{'y' * (MAX_STAGE_CHARACTERS - 1)}…": 0.25}
        many = StepReply(4, stages={str(number): 1.0 for number in range(1_000)})
        assert len(self.roundtrip(many).stages) == MAX_STAGES

    def test_logprobs_without_alternatives_survive_round_trip(self) -> None:
        reply = StepReply(4, tokens=(SessionToken(1, 0, Token(7, 20, TokenLogprobs(0.0, ()))),))
        assert self.roundtrip(reply) == reply
