"""Steps and replies as frames and back. Knows neither streams nor the engine's thread.

A step whose rows exceed a frame is cut at row boundaries; the first frame carries the segments, and a small step of
another number may pass between two frames of a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from stitch.errors import InvalidRequest, OutOfStep
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2, shard_pb2
from stitch_server.engine.session_table import Opening, ReceivedSegment
from stitch_server.engine.types import (
    OutgoingStep,
    Segment,
    SessionFailure,
    SessionToken,
    StepReply,
    Token,
    TokenLogprobs,
)
from stitch_server.rpc.tensors import Packed

# On loopback a 14.7 MB message sent whole made a neighbouring decode step's p95 95 ms, in frames of this size 5 ms.
FRAME_BYTES = 256 << 10


def step_frames(step: OutgoingStep, rows: Packed) -> Iterator[shard_pb2.LinkRequest]:
    """The frames of a step, in order; `rows` are its hidden states, packed."""
    row_bytes = max(1, len(rows.data) // max(1, rows.tokens))
    scale_bytes = 4 if rows.scales else 0
    frame_rows = max(1, FRAME_BYTES // row_bytes)
    for start in range(0, max(1, rows.tokens), frame_rows):
        count = min(frame_rows, rows.tokens - start)
        hidden = shard_pb2.HiddenStates(
            dtype=rows.dtype,
            tokens=count,
            hidden_size=rows.width,
            data=rows.data[start * row_bytes : (start + count) * row_bytes],
            scales=rows.scales[start * scale_bytes : (start + count) * scale_bytes],
        )
        frame = shard_pb2.Step(
            step=step.number,
            hidden=hidden,
            tokens_to_come=rows.tokens - start - count,
            pipelined=step.pipelined,
        )
        if start == 0:
            pairs = zip(step.segments, step.opens, strict=True)
            frame.segments.extend(_segment_message(segment, opens) for segment, opens in pairs)
        yield shard_pb2.LinkRequest(step=frame)


def _segment_message(segment: Segment, opens: bool) -> shard_pb2.Segment:
    sequence = segment.session
    message = shard_pb2.Segment(
        session=sequence.id,
        epoch=sequence.epoch,
        position=segment.position,
        length=segment.length,
        wants_token=segment.wants_token,
    )
    if opens:
        message.new_session.route = sequence.route
        message.new_session.chain.extend(sequence.chain[1:])
        message.new_session.sampling.CopyFrom(sequence.sampling.to_proto())
        message.new_session.token_ids.extend(sequence.token_ids)
        message.new_session.prompt_tokens = sequence.prompt_tokens
        message.new_session.reused_tokens = sequence.reused
    return message


@dataclass(frozen=True, slots=True)
class AssembledStep:
    """A step whose frames have all arrived."""

    number: int
    segments: tuple[ReceivedSegment, ...]
    rows: Packed
    pipelined: bool


@dataclass(slots=True)
class _Partial:
    first: shard_pb2.Step
    tokens_to_come: int
    data: list[bytes] = field(default_factory=list)
    scales: list[bytes] = field(default_factory=list)


# Steps of which some frames are still to come; a sender has one, or two where an urgent one overtakes.
MOST_BEGUN = 16


class Assembly:
    """Puts the frames of one link's steps together, and holds no more than `max_tokens` rows of each of a few."""

    def __init__(self, width: int, dtype: shard_pb2.Dtype, max_tokens: int) -> None:
        self._width = width
        self._dtype = dtype
        self._max_tokens = max_tokens
        self._partial: dict[int, _Partial] = {}

    def add(self, frame: shard_pb2.Step) -> AssembledStep | None:
        """The step that `frame` completes, or None while more is to come.

        Raises InvalidRequest for bytes that do not fit their shape, OutOfStep for frames that do not fit together.
        """
        hidden = frame.hidden
        # Each reading of a message's bytes copies them.
        data, scales = hidden.data, hidden.scales
        Packed(hidden.dtype, hidden.tokens, hidden.hidden_size, data, scales).check(self._width, self._dtype)
        if hidden.tokens < 1:
            raise InvalidRequest("step.hidden.tokens", hidden.tokens, "a frame brings at least 1")
        partial = self._partial.get(frame.step) or self._begin(frame)
        if partial.tokens_to_come != hidden.tokens + frame.tokens_to_come:
            raise OutOfStep(
                f"step {frame.step} has {partial.tokens_to_come} tokens to come, "
                f"but a frame brings {hidden.tokens} and announces {frame.tokens_to_come} more"
            )
        partial.tokens_to_come = frame.tokens_to_come
        partial.data.append(data)
        partial.scales.append(scales)
        if partial.tokens_to_come:
            self._partial[frame.step] = partial
            return None
        self._partial.pop(frame.step, None)
        return self._assembled(partial)

    def _begin(self, frame: shard_pb2.Step) -> _Partial:
        if len(self._partial) >= MOST_BEGUN:
            raise OutOfStep(f"step {frame.step} begins while {MOST_BEGUN} others are not complete, which is the limit")
        announced = frame.hidden.tokens + frame.tokens_to_come
        if announced > self._max_tokens:
            raise InvalidRequest("step.hidden.tokens", announced, f"a step holds at most {self._max_tokens}")
        if any(segment.length < 1 for segment in frame.segments):
            raise InvalidRequest("step.segments.length", 0, "it must be at least 1")
        described = sum(segment.length for segment in frame.segments)
        if described != announced:
            raise InvalidRequest("step.segments", f"{described} tokens", f"the step's hidden states are {announced}")
        return _Partial(frame, announced)

    def _assembled(self, partial: _Partial) -> AssembledStep:
        frame = partial.first
        data, scales = b"".join(partial.data), b"".join(partial.scales)
        tokens = sum(segment.length for segment in frame.segments)
        rows = Packed(frame.hidden.dtype, tokens, frame.hidden.hidden_size, data, scales)
        segments = tuple(_received(segment) for segment in frame.segments)
        return AssembledStep(frame.step, segments, rows, frame.pipelined)


def _received(message: shard_pb2.Segment) -> ReceivedSegment:
    opening = _opening(message.new_session) if message.HasField("new_session") else None
    return ReceivedSegment(
        message.session, message.epoch, message.position, message.length, message.wants_token, opening
    )


def _opening(message: shard_pb2.NewSession) -> Opening:
    return Opening(
        route=message.route,
        chain=tuple(message.chain),
        sampling=Sampling.from_proto(message.sampling),
        token_ids=tuple(message.token_ids),
        prompt_tokens=message.prompt_tokens,
        reused_tokens=message.reused_tokens,
    )


def reply_frame(reply: StepReply) -> shard_pb2.LinkResponse:
    """An answer as it goes back."""
    message = shard_pb2.StepReply(step=reply.step, stages=stage_messages(reply.stages))
    for one in reply.tokens:
        message.tokens.add(session=one.session_id, epoch=one.epoch, token=token_message(one.token))
    for failure in reply.failures:
        message.failures.add(
            session=failure.session_id, epoch=failure.epoch, cause=failure.cause, message=failure.message
        )
    return shard_pb2.LinkResponse(reply=message)


def reply_of(message: shard_pb2.StepReply) -> StepReply:
    """An answer as it arrives."""
    return StepReply(
        step=message.step,
        tokens=tuple(SessionToken(one.session, one.epoch, _token(one.token)) for one in message.tokens),
        failures=tuple(SessionFailure(one.session, one.epoch, one.cause, one.message) for one in message.failures),
        stages={stage.name: stage.seconds for stage in message.stages},
    )


def stage_messages(stages: dict[str, float]) -> list[inference_pb2.Stage]:
    return [inference_pb2.Stage(name=name, seconds=seconds) for name, seconds in stages.items()]


def token_message(token: Token) -> shard_pb2.GeneratedToken:
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
