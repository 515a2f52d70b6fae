"""Steps and replies to frames of a link, and back.

A step whose hidden states exceed one frame is split at rows; the first frame carries the segments. Frames of several
steps may interleave. Invariant: a step reaches the engine complete and consistent with its segments, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from stitch.errors import InvalidRequest, OutOfStep, plain
from stitch.sampling import Sampling, Token, TokenLogprobs
from stitch.v1 import inference_pb2, shard_pb2
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
# Incomplete steps of one link. A sender has one, or two while an urgent step overtakes.
MAX_INCOMPLETE_STEPS = 16


def step_frames(step: OutgoingStep, packed: Packed) -> Iterator[shard_pb2.LinkRequest]:
    """The frames of a step, in order; `packed` are its hidden states."""
    row_bytes = max(1, len(packed.data) // max(1, packed.tokens))
    scale_bytes = 4 if packed.scales else 0
    frame_rows = max(1, FRAME_BYTES // row_bytes)
    for start in range(0, max(1, packed.tokens), frame_rows):
        count = min(frame_rows, packed.tokens - start)
        hidden = shard_pb2.HiddenStates(
            dtype=packed.dtype,
            tokens=count,
            hidden_size=packed.width,
            data=packed.data[start * row_bytes : (start + count) * row_bytes],
            scales=packed.scales[start * scale_bytes : (start + count) * scale_bytes],
        )
        frame = shard_pb2.Step(
            step=step.number,
            hidden=hidden,
            tokens_to_come=packed.tokens - start - count,
            pipelined=step.pipelined,
        )
        if start == 0:
            pairs = zip(step.segments, step.opens, strict=True)
            frame.segments.extend(_segment_message(segment, opens) for segment, opens in pairs)
        yield shard_pb2.LinkRequest(step=frame)


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
    return message


@dataclass(slots=True)
class _IncompleteStep:
    """A step of which frames are missing."""

    first: shard_pb2.Step
    tokens_to_come: int
    data: list[bytes] = field(default_factory=list)
    scales: list[bytes] = field(default_factory=list)


class StepAssembler:
    """Assembles the steps of one link from their frames; holds at most `max_tokens` rows of each incomplete step."""

    def __init__(
        self,
        width: int,
        dtype: shard_pb2.Dtype,
        max_tokens: int,
        unpack: Callable[[Packed], Tensor],
        count_bytes: Callable[[int], None] = lambda received: None,
    ) -> None:
        """`unpack` runs in the engine's thread; `count_bytes` is called with the bytes of each step's hidden states."""
        self._width = width
        self._dtype = dtype
        self._max_tokens = max_tokens
        self._unpack = unpack
        self._count_bytes = count_bytes
        # By step number.
        self._incomplete: dict[int, _IncompleteStep] = {}

    def add(self, frame: shard_pb2.Step) -> IncomingStep | None:
        """Returns the step that `frame` completes, or None while frames of it are missing.

        Raises InvalidRequest for bytes that do not fit their shape, OutOfStep for frames that do not fit together.
        """
        hidden = frame.hidden
        # Each access to a message's bytes copies them.
        data, scales = hidden.data, hidden.scales
        Packed(hidden.dtype, hidden.tokens, hidden.hidden_size, data, scales).check(self._width, self._dtype)
        if hidden.tokens < 1:
            raise InvalidRequest("step.hidden.tokens", hidden.tokens, "a frame brings at least 1")
        incomplete = self._incomplete.get(frame.step) or self._start(frame)
        if incomplete.tokens_to_come != hidden.tokens + frame.tokens_to_come:
            raise OutOfStep(
                f"step {frame.step} has {incomplete.tokens_to_come} tokens to come, "
                f"but a frame brings {hidden.tokens} and announces {frame.tokens_to_come} more"
            )
        incomplete.tokens_to_come = frame.tokens_to_come
        incomplete.data.append(data)
        incomplete.scales.append(scales)
        if incomplete.tokens_to_come:
            self._incomplete[frame.step] = incomplete
            return None
        self._incomplete.pop(frame.step, None)
        return self._complete(incomplete)

    def _start(self, frame: shard_pb2.Step) -> _IncompleteStep:
        """Checks a step's first frame, so that nothing of an invalid step is kept."""
        if len(self._incomplete) >= MAX_INCOMPLETE_STEPS:
            limit = f"{MAX_INCOMPLETE_STEPS} others are not complete, which is the limit"
            raise OutOfStep(f"step {frame.step} begins while {limit}")
        announced = frame.hidden.tokens + frame.tokens_to_come
        if announced > self._max_tokens:
            raise InvalidRequest("step.hidden.tokens", announced, f"a step holds at most {self._max_tokens}")
        if any(segment.length < 1 for segment in frame.segments):
            raise InvalidRequest("step.segments.length", 0, "it must be at least 1")
        described = sum(segment.length for segment in frame.segments)
        if described != announced:
            raise InvalidRequest("step.segments", f"{described} tokens", f"the step's hidden states are {announced}")
        return _IncompleteStep(frame, announced)

    def _complete(self, step: _IncompleteStep) -> IncomingStep:
        frame = step.first
        data, scales = b"".join(step.data), b"".join(step.scales)
        self._count_bytes(len(data))
        tokens = sum(segment.length for segment in frame.segments)
        packed = Packed(frame.hidden.dtype, tokens, frame.hidden.hidden_size, data, scales)
        segments = tuple(_incoming_segment(message) for message in frame.segments)
        return IncomingStep(frame.step, segments, partial(self._unpack, packed), frame.pipelined)


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
    """The session as it is before its first segment. Raises InvalidRequest for sampling outside of its limits."""
    opened = message.new_session
    return Session(
        route=opened.route,
        chain=tuple(opened.chain),
        sampling=Sampling.from_proto(opened.sampling),
        token_ids=list(opened.token_ids),
        prompt_tokens=opened.prompt_tokens,
        tenant=opened.tenant,
        epoch=message.epoch,
        cached=opened.reused_tokens,
        reused=opened.reused_tokens,
    )


def reply_frame(reply: StepReply) -> shard_pb2.LinkResponse:
    """The frame of a reply."""
    message = shard_pb2.StepReply(step=reply.step, stages=stage_messages(reply.stages))
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
