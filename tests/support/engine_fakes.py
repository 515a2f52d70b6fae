"""Fakes of the engine's dependencies: a clock, links that record their calls, step outputs, and new requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from stitch.sampling import Sampling, Token
from stitch_server.engine.kept_states import KeptPrefixes
from stitch_server.engine.request import Request, RequestOutput
from stitch_server.engine.types import Batch, OutgoingStep, SessionToken, StepOutput, StepReply
from stitch_server.kv_cache.block_pool import BlockPool

WIDTH = 4
# The token that every fake chain samples.
TOKEN_ID = 7
NO_STAGES: Mapping[str, float] = MappingProxyType({})


@dataclass
class ManualClock:
    """A clock in seconds that a test advances."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeDownstream:
    """Records the calls of the links to the next shards."""

    sent: list[tuple[str, OutgoingStep]] = field(default_factory=list)
    closed: list[tuple[str, int]] = field(default_factory=list)
    wanted: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)
    doubted: set[str] = field(default_factory=set)

    def send(self, neighbour: str, step: OutgoingStep) -> None:
        self.sent.append((neighbour, step))

    def close(self, neighbour: str, session_ids: Sequence[int]) -> None:
        self.closed += [(neighbour, session_id) for session_id in session_ids]

    def want(self, neighbour: str, tokens: int, chain: Sequence[str]) -> None:
        self.wanted.append((neighbour, tokens, tuple(chain)))

    @property
    def last(self) -> OutgoingStep:
        return self.sent[-1][1]

    def receiver_of(self, number: int) -> str:
        """The shard to which a step was sent; of an unknown one the last shard that was sent anything."""
        receivers = {step.number: neighbour for neighbour, step in self.sent}
        return receivers.get(number, self.sent[-1][0] if self.sent else "none")

    def answer(self, step: OutgoingStep, token_id: int = TOKEN_ID) -> StepReply:
        """A reply with one token for every segment that wants a token."""
        wanting = [segment for segment in step.segments if segment.wants_token]
        tokens = [
            SessionToken(one.session.id, one.session.epoch, Token(token_id, one.position + one.length))
            for one in wanting
        ]
        return StepReply(step.number, tuple(tokens))


@dataclass(eq=False)
class FakeUpstream:
    """Records the replies to an upstream shard."""

    replies: list[StepReply] = field(default_factory=list)
    routes: frozenset[str] = frozenset({"weak", "strong"})
    prefix_scope: str = "bottom-0"
    is_local: bool = False

    # The KV room that was kept for this link, in tokens.
    granted: list[int] = field(default_factory=list)

    def reply(self, reply: StepReply) -> None:
        self.replies.append(reply)

    def grant(self, tokens: int) -> None:
        self.granted.append(tokens)

    @property
    def last(self) -> StepReply:
        return self.replies[-1]


def without_states(pool: BlockPool) -> KeptPrefixes:
    """What a stage keeps where it has KV blocks alone, and no hidden states of prefixes."""
    return KeptPrefixes(pool, {}, None)


def any_chain(route: str, chain: Sequence[str]) -> None:
    """Accepts every chain."""


def computed(batch: Batch, non_finite: Sequence[int] = (), stages: Mapping[str, float] = NO_STAGES) -> StepOutput:
    """The output of a shard before the last one: hidden states of zeros."""
    rows = torch.zeros(batch.num_tokens, WIDTH)
    return StepOutput(hidden=rows, non_finite=dict.fromkeys(non_finite, "hidden states"), stages=dict(stages))


def sampled(batch: Batch, non_finite: Sequence[int] = (), stages: Mapping[str, float] = NO_STAGES) -> StepOutput:
    """The output of the chain's last shard: always the same token."""
    tokens = {
        index: Token(TOKEN_ID, segment.position + segment.length)
        for index, segment in enumerate(batch.segments)
        if segment.wants_token and index not in non_finite
    }
    return StepOutput(tokens=tokens, non_finite=dict.fromkeys(non_finite, "hidden states"), stages=dict(stages))


def new_request(
    tokens: int = 20,
    route: str = "weak",
    *,
    chain: tuple[str, ...] = ("top-0",),
    outputs: list[RequestOutput] | None = None,
    first_token: int = 0,
    **fields: Any,
) -> Request:
    """A request whose prompt counts upwards from `first_token`; fields of its sampling are given by name."""
    own = {
        name: fields.pop(name)
        for name in (
            "context_length",
            "vocabulary_size",
            "prompt_tokens",
            "candidates",
            "tenant",
            "tenant_weight",
            "deadline",
        )
        if name in fields
    }
    outputs = [] if outputs is None else outputs
    return Request(
        route=route,
        chain=chain,
        sampling=Sampling(**fields),
        token_ids=list(range(first_token, first_token + tokens)),
        on_output=outputs.append,
        **{"context_length": 10_000, "vocabulary_size": 10_000, "prompt_tokens": tokens, **own},
    )
