"""What stands around a shard's engine, as objects that only write down what they are told. Knows no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from stitch.sampling import Sampling
from stitch_server.engine.session import Request, RequestOutput
from stitch_server.engine.types import Batch, OutgoingStep, SessionToken, StepOutput, StepReply, Token

WIDTH = 4
# What every step of a fake chain answers.
TOKEN_ID = 7
NO_STAGES: Mapping[str, float] = MappingProxyType({})


@dataclass
class ManualClock:
    """Seconds that pass when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeDownstream:
    """The links to the next shards."""

    sent: list[tuple[str, OutgoingStep]] = field(default_factory=list)
    closed: list[tuple[str, int]] = field(default_factory=list)

    def send(self, address: str, step: OutgoingStep) -> None:
        self.sent.append((address, step))

    def close(self, address: str, numbers: Sequence[int]) -> None:
        self.closed += [(address, number) for number in numbers]

    @property
    def last(self) -> OutgoingStep:
        return self.sent[-1][1]

    def answer(self, step: OutgoingStep, token_id: int = TOKEN_ID) -> StepReply:
        """A reply with one token for every segment that wants one."""
        wanting = [segment for segment in step.segments if segment.wants_token]
        tokens = [
            SessionToken(one.session.id, one.session.epoch, Token(token_id, one.position + one.length))
            for one in wanting
        ]
        return StepReply(step.number, tuple(tokens))


@dataclass(eq=False)
class FakeUpstream:
    """The link that steps came from."""

    replies: list[StepReply] = field(default_factory=list)

    def reply(self, reply: StepReply) -> None:
        self.replies.append(reply)

    @property
    def last(self) -> StepReply:
        return self.replies[-1]


def computed(batch: Batch, non_finite: Sequence[int] = (), stages: Mapping[str, float] = NO_STAGES) -> StepOutput:
    """What a runner in the middle of a chain makes of a batch: rows of zeros."""
    rows = torch.zeros(batch.num_tokens, WIDTH)
    return StepOutput(hidden=rows, non_finite=frozenset(non_finite), stages=dict(stages))


def sampled(batch: Batch, non_finite: Sequence[int] = (), stages: Mapping[str, float] = NO_STAGES) -> StepOutput:
    """What a runner at the end of a chain makes of a batch: always the same token."""
    tokens = {
        index: Token(TOKEN_ID, segment.position + segment.length)
        for index, segment in enumerate(batch.segments)
        if segment.wants_token and index not in non_finite
    }
    return StepOutput(tokens=tokens, non_finite=frozenset(non_finite), stages=dict(stages))


def new_session(
    tokens: int = 20,
    route: str = "weak",
    *,
    chain: tuple[str, ...] = ("top:1",),
    heard: list[RequestOutput] | None = None,
    first_token: int = 0,
    **fields: Any,
) -> Request:
    """A session whose prompt counts upwards from `first_token`; fields of its sampling are told by their names."""
    own = {name: fields.pop(name) for name in ("context_length", "prompt_tokens", "candidates") if name in fields}
    heard = [] if heard is None else heard
    return Request(
        route=route,
        chain=chain,
        sampling=Sampling(**fields),
        token_ids=list(range(first_token, first_token + tokens)),
        report=heard.append,
        **{"context_length": 10_000, "prompt_tokens": tokens, **own},
    )
