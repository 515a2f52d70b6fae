"""Frames of interleaved steps, split at any rows, become the steps that were sent; invalid frames raise StitchError."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from stitch.errors import InvalidRequest, OutOfStep
from stitch.v1 import shard_pb2
from stitch_server.engine.in_flight import MAX_UNANSWERED_STEPS
from stitch_server.rpc.frames import MAX_SEGMENTS, StepAssembler, StepLimits
from stitch_server.rpc.tensors import pack, unpack

WIDTH = 3
MAX_TOKENS = 40


@dataclass
class SentStep:
    """A step and those of its frames that have not arrived."""

    lengths: list[int]
    hidden: Tensor
    frames: list[shard_pb2.Step]


def split(number: int, lengths: list[int], cuts: list[int]) -> SentStep:
    """A step of these segments, whose frames end at the rows `cuts`."""
    tokens = sum(lengths)
    hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(number))
    frames = []
    for start, end in pairwise([0, *sorted({cut for cut in cuts if 0 < cut < tokens}), tokens]):
        packed = pack(hidden[start:end], shard_pb2.DTYPE_FLOAT32)
        states = shard_pb2.HiddenStates(dtype=packed.dtype, tokens=end - start, hidden_size=WIDTH, data=packed.data)
        frames.append(shard_pb2.Step(step=number, hidden=states, tokens_to_come=tokens - end))
    for index, length in enumerate(lengths):
        frames[0].segments.add(session=index, length=length)
    return SentStep(lengths, hidden, frames)


def another_dtype(frame: shard_pb2.Step) -> None:
    frame.hidden.dtype = shard_pb2.DTYPE_BFLOAT16


def another_width(frame: shard_pb2.Step) -> None:
    frame.hidden.hidden_size += 1


def missing_bytes(frame: shard_pb2.Step) -> None:
    frame.hidden.data = frame.hidden.data[:-1]


def surplus_scales(frame: shard_pb2.Step) -> None:
    frame.hidden.scales = b"\0" * 4


def surplus_token(frame: shard_pb2.Step) -> None:
    frame.hidden.tokens += 1


def no_token(frame: shard_pb2.Step) -> None:
    frame.hidden.tokens, frame.hidden.data = 0, b""


def nothing(frame: shard_pb2.Step) -> None:
    frame.Clear()


DAMAGES: tuple[Callable[[shard_pb2.Step], None], ...] = (
    another_dtype,
    another_width,
    missing_bytes,
    surplus_scales,
    surplus_token,
    no_token,
    nothing,
)


class AssemblerMachine(RuleBasedStateMachine):
    """One link after another: an invalid frame ends a link, and nothing of it reaches the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.open_link()

    def open_link(self) -> None:
        unpacked = lambda packed: unpack(packed, torch.device("cpu"), torch.float32)  # noqa: E731
        self.assembler = StepAssembler(WIDTH, shard_pb2.DTYPE_FLOAT32, StepLimits(MAX_TOKENS, 1 << 20), unpacked)
        self.steps: dict[int, SentStep] = {}

    @precondition(lambda self: len(self.steps) < MAX_UNANSWERED_STEPS)
    @rule(
        lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
        cuts=st.lists(st.integers(1, MAX_TOKENS), max_size=6),
    )
    def send(self, lengths: list[int], cuts: list[int]) -> None:
        self.number += 1
        self.steps[self.number] = split(self.number, lengths, cuts)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.steps)))
        sent = self.steps[number]
        complete = self.assembler.add(sent.frames.pop(0))
        assert (complete is not None) == (not sent.frames)
        if complete is not None:
            del self.steps[number]
            self.assembler.answered(number)
            assert complete.number == number
            assert [one.length for one in complete.segments] == sent.lengths
            assert torch.equal(complete.hidden(), sent.hidden)

    @precondition(lambda self: self.steps)
    @rule(data=st.data(), damage=st.sampled_from(DAMAGES))
    def arrive_damaged(self, data: st.DataObject, damage: Callable[[shard_pb2.Step], None]) -> None:
        frame = self.steps[data.draw(st.sampled_from(sorted(self.steps)))].frames[0]
        damage(frame)
        with pytest.raises((InvalidRequest, OutOfStep)):
            self.assembler.add(frame)
        self.open_link()

    @rule(tokens=st.integers(MAX_TOKENS + MAX_SEGMENTS + 1, 2**32 - 1))
    def announce_too_many(self, tokens: int) -> None:
        frame = split(self.number + 1, [1], []).frames[0]
        frame.tokens_to_come = tokens - 1
        with pytest.raises(InvalidRequest, match=f"a step holds at most {MAX_TOKENS + MAX_SEGMENTS}"):
            self.assembler.add(frame)


AssemblerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestAssemblerMachine = AssemblerMachine.TestCase
