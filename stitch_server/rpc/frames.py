"""Steps and replies to frames of a link, and back.

A step that exceeds one frame is split at rows; a segment travels in the frame of its first row. Frames of several steps
may interleave. Invariant: a step reaches the engine complete, consistent with its segments and within the window of its
link, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from stitch.errors import InvalidRequest, OutOfStep, plain
from stitch.grammar import Grammar
from stitch.sampling import Sampling, Token, TokenLogprobs
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.engine.in_flight import MAX_UNANSWERED_STEPS
from stitch_server.engine.types import (
    IncomingSegment,
    IncomingStep,
    OutgoingStep,
    Segment,
    Session,
    SessionFailure,
    SessionToken,
    StepReply,
)
from stitch_server.rpc.tensors import Packed

if TYPE_CHECKING:
    from torch import Tensor

# On loopback a 14.7 MB message sent whole made a neighbouring decode step's p95 95 ms, in frames of this size 5 ms.
FRAME_BYTES = 256 << 10
# Stages of a reply, and characters of their names and of a failure's message: more than a shard sends.
MAX_STAGES = 32
MAX_STAGE_CHARACTERS = 64
MAX_FAILURE_CHARACTERS = 500
# Segments of one step: sessions that decode, and those whose prompts are being computed.
MAX_SEGMENTS = 4_096


def step_frames(step: OutgoingStep, packed: Packed) -> Iterator[shard_pb2.LinkRequest]:
    """The frames of a step, in order; `packed` are its hidden states. A segment is in the frame of its first row."""
    row_bytes = max(1, len(packed.data) // max(1, packed.tokens))
    scale_bytes = 4 if packed.scales else 0
    frame_rows = max(1, FRAME_BYTES // row_bytes)
    begins = [0, *accumulate(segment.length for segment in step.segments)]
    start = index = 0
    while start < packed.tokens:
        end, segments = min(start + frame_rows, packed.tokens), list[shard_pb2.Segment]()
        segment_bytes = 0
        while index < len(step.segments) and begins[index] < end:
            message = _segment_message(step.segments[index], step.opens[index])
            segment_bytes += message.ByteSize()
            if segments and segment_bytes > FRAME_BYTES:
                end = begins[index]
                break
            segments.append(message)
            index += 1
        hidden = shard_pb2.HiddenStates(
            dtype=packed.dtype,
            tokens=end - start,
            hidden_size=packed.width,
            data=packed.data[start * row_bytes : end * row_bytes],
            scales=packed.scales[start * scale_bytes : end * scale_bytes],
        )
        to_come = packed.tokens - end
        frame = shard_pb2.Step(
            step=step.number, segments=segments, hidden=hidden, tokens_to_come=to_come, pipelined=step.pipelined
        )
        yield shard_pb2.LinkRequest(step=frame)
        start = end


def _segment_message(segment: Segment, opens: bool) -> shard_pb2.Segment:
    session = segment.session
    message = shard_pb2.Segment(
        session=session.id,
        epoch=session.epoch,
        position=segment.position,
        length=segment.length,
        wants_token=segment.wants_token,
    )
    if opens:
        new_session = message.new_session
        new_session.route = session.route
        new_session.chain.extend(session.chain[1:])
        new_session.sampling.CopyFrom(session.sampling.to_proto())
        new_session.token_ids.extend(session.token_ids)
        new_session.prompt_tokens = session.prompt_tokens
        new_session.reused_tokens = session.reused
        new_session.tenant = session.tenant
        new_session.expected_tokens = session.expected_tokens
        if session.grammar is not None:
            new_session.grammar.CopyFrom(session.grammar.to_proto())
        new_session.traceparent = session.traceparent
    return message


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one link may send before its steps are answered."""

    # Prompt tokens of one step; each of its segments may have one token more.
    max_prefill_tokens: int
    # Hidden states of all steps that are not answered.
    max_bytes: int
    max_steps: int = 2 * MAX_UNANSWERED_STEPS


@dataclass(slots=True)
class _Step:
    """A step of which frames are missing."""

    number: int
    pipelined: bool
    dtype: shard_pb2.Dtype
    # Tokens of all frames, of those that are missing, and of the segments that have come.
    tokens: int
    tokens_to_come: int
    described: int = 0
    segments: list[IncomingSegment] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    scales: list[bytes] = field(default_factory=list)


class StepAssembler:
    """Assembles the steps of one link from their frames, and holds the link to its window until they are answered."""

    def __init__(
        self,
        width: int,
        dtype: shard_pb2.Dtype,
        limits: StepLimits,
        unpack: Callable[[Packed], Tensor],
        count_bytes: Callable[[int], None] = lambda received: None,
    ) -> None:
        """`unpack` runs in the engine's thread; `count_bytes` is called with the bytes of each step's hidden states."""
        self._width = width
        self._dtype = dtype
        self._limits = limits
        self._unpack = unpack
        self._count_bytes = count_bytes
        # By step number.
        self._incomplete: dict[int, _Step] = {}
        # Bytes of the hidden states of every step that is not answered, by its number.
        self._unanswered: dict[int, int] = {}

    def add(self, frame: shard_pb2.Step) -> IncomingStep | None:
        """Returns the step that `frame` completes, or None while frames of it are missing.

        Raises InvalidRequest for bytes that do not fit their shape, OutOfStep for frames that do not fit together or
        into the link's window.
        """
        hidden = frame.hidden
        # Each access to a message's bytes copies them.
        data, scales = hidden.data, hidden.scales
        Packed(hidden.dtype, hidden.tokens, hidden.hidden_size, data, scales).check(self._width, self._dtype)
        if hidden.tokens < 1:
            raise InvalidRequest("step.hidden.tokens", hidden.tokens, "a frame brings at least 1")
        step = self._incomplete.get(frame.step) or self._start(frame, len(data) + len(scales))
        if step.tokens_to_come != hidden.tokens + frame.tokens_to_come:
            raise OutOfStep(
                f"step {frame.step} has {step.tokens_to_come} tokens to come, "
                f"but a frame brings {hidden.tokens} and announces {frame.tokens_to_come} more"
            )
        step.tokens_to_come = frame.tokens_to_come
        self._describe(step, frame.segments)
        step.data.append(data)
        step.scales.append(scales)
        if step.tokens_to_come:
            self._incomplete[frame.step] = step
            return None
        self._incomplete.pop(frame.step, None)
        return self._complete(step)

    def answered(self, number: int) -> None:
        """The reply to a step has been sent: it leaves the window."""
        self._unanswered.pop(number, None)

    def _start(self, frame: shard_pb2.Step, frame_bytes: int) -> _Step:
        """Checks a step's first frame, so that nothing of an invalid step is kept; it takes its place in the window."""
        number, limits = frame.step, self._limits
        if number in self._unanswered:
            raise OutOfStep(f"step {number} begins again before it is answered")
        if len(self._unanswered) >= limits.max_steps:
            raise OutOfStep(
                f"step {number} begins while {limits.max_steps} others are not answered, which is the limit"
            )
        announced = frame.hidden.tokens + frame.tokens_to_come
        if announced > limits.max_prefill_tokens + MAX_SEGMENTS:
            limit = f"a step holds at most {limits.max_prefill_tokens + MAX_SEGMENTS}"
            raise InvalidRequest("step.hidden.tokens", announced, limit)
        size = announced * frame_bytes // frame.hidden.tokens
        if sum(self._unanswered.values()) + size > limits.max_bytes:
            raise OutOfStep(f"step {number} takes the unanswered steps of its link over {limits.max_bytes} bytes")
        self._unanswered[number] = size
        return _Step(number, frame.pipelined, frame.hidden.dtype, announced, announced)

    def _describe(self, step: _Step, segments: Sequence[shard_pb2.Segment]) -> None:
        """Adds the segments of a frame. Raises InvalidRequest where they contradict the step's tokens or its limits."""
        for segment in segments:
            if segment.length < 1:
                raise InvalidRequest("step.segments.length", 0, "it must be at least 1")
            step.described += segment.length
            step.segments.append(_incoming_segment(segment))
        tokens = f"{step.described} tokens in {len(step.segments)} segments"
        if not step.tokens - step.tokens_to_come <= step.described <= step.tokens:
            limit = f"{step.tokens - step.tokens_to_come} of the step's {step.tokens} have come"
            raise InvalidRequest("step.segments", tokens, limit)
        if len(step.segments) > MAX_SEGMENTS:
            raise InvalidRequest("step.segments", tokens, f"{MAX_SEGMENTS} segments are the limit")
        if step.described - len(step.segments) > self._limits.max_prefill_tokens:
            limit = f"besides one token a segment, {self._limits.max_prefill_tokens} are the limit"
            raise InvalidRequest("step.segments", tokens, limit)

    def _complete(self, step: _Step) -> IncomingStep:
        data, scales = b"".join(step.data), b"".join(step.scales)
        self._count_bytes(len(data))
        packed = Packed(step.dtype, step.tokens, self._width, data, scales)
        return IncomingStep(step.number, tuple(step.segments), partial(self._unpack, packed), step.pipelined)


def _incoming_segment(message: shard_pb2.Segment) -> IncomingSegment:
    return IncomingSegment(
        session_id=message.session,
        epoch=message.epoch,
        position=message.position,
        length=message.length,
        wants_token=message.wants_token,
        new_session=_new_session(message) if message.HasField("new_session") else None,
    )


def _new_session(message: shard_pb2.Segment) -> Session:
    """The session as it is before its first segment. Raises InvalidRequest for a value outside of its limits."""
    opened = message.new_session
    return Session(
        route=opened.route,
        chain=tuple(opened.chain),
        sampling=Sampling.from_proto(opened.sampling),
        token_ids=list(opened.token_ids),
        prompt_tokens=opened.prompt_tokens,
        tenant=opened.tenant,
        expected_tokens=opened.expected_tokens,
        grammar=Grammar.from_proto(opened.grammar) if opened.HasField("grammar") else None,
        traceparent=opened.traceparent,
        epoch=message.epoch,
        cached=opened.reused_tokens,
        reused=opened.reused_tokens,
    )


def reply_frame(reply: StepReply) -> shard_pb2.LinkResponse:
    """The frame of a reply."""
    stages = stage_messages(reply.stages)
    message = shard_pb2.StepReply(step=reply.step, stages=stages, kv_free_tokens=reply.kv_free_tokens)
    for one in reply.tokens:
        message.tokens.add(session=one.session_id, epoch=one.epoch, token=token_message(one.token))
    for failure in reply.failures:
        message.failures.add(
            session=failure.session_id,
            epoch=failure.epoch,
            cause=failure.cause,
            message=failure.message,
            shard=failure.shard,
        )
    return shard_pb2.LinkResponse(reply=message)


def reply_of(message: shard_pb2.StepReply) -> StepReply:
    """The reply of a frame, with no more of its words than an error or a log holds."""
    return StepReply(
        step=message.step,
        tokens=tuple(SessionToken(one.session, one.epoch, _token(one.token)) for one in message.tokens),
        failures=tuple(map(_failure, message.failures)),
        stages={
            plain(stage.name, MAX_STAGE_CHARACTERS): stage.seconds
            for stage in message.stages[:MAX_STAGES]
            if 0 <= stage.seconds < math.inf
        },
        kv_free_tokens=message.kv_free_tokens if message.HasField("kv_free_tokens") else None,
    )


def _failure(message: shard_pb2.SessionFailure) -> SessionFailure:
    said = plain(message.message, MAX_FAILURE_CHARACTERS)
    return SessionFailure(message.session, message.epoch, message.cause, said, message.shard)


def stage_messages(stages: dict[str, float]) -> list[inference_pb2.Stage]:
    """Seconds by stage, as messages."""
    return [inference_pb2.Stage(name=name, seconds=seconds) for name, seconds in stages.items()]


def token_message(token: Token) -> shard_pb2.GeneratedToken:
    """A sampled token, as a message."""
    message = shard_pb2.GeneratedToken(id=token.id, position=token.position)
    if token.logprobs is not None:
        message.logprobs.token_id = token.id
        message.logprobs.logprob = token.logprobs.logprob
        for token_id, logprob in token.logprobs.alternatives:
            message.logprobs.alternatives.add(token_id=token_id, logprob=logprob)
    return message


def _token(message: shard_pb2.GeneratedToken) -> Token:
    if not message.HasField("logprobs"):
        return Token(message.id, message.position)
    alternatives = tuple((one.token_id, one.logprob) for one in message.logprobs.alternatives)
    return Token(message.id, message.position, TokenLogprobs(message.logprobs.logprob, alternatives))
