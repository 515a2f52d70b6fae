"""What a client asks and what it gets, as values. Knows no protocol and no way to an answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from router_gateway.routing.objectives import ANYTHING, Objectives
from router_gateway.routing.router import RouteDecision
from stitch.sampling import Sampling
from stitch.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


# Plain text, tokenized as it is, or a conversation for the model's chat template.
Prompt = str | tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Request:
    request_id: str
    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...] = ()
    # None: the router decides.
    route: str | None = None
    # What the answer is; None: what the model says.
    forced_answer: str | None = None
    objectives: Objectives = ANYTHING
    # Empty: it belongs to none.
    conversation_id: str = ""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    id: int
    # Where they were asked for.
    logprobs: inference_pb2.TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Part of the time to the first token, by one process's own clock."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Started:
    request_id: str
    decision: RouteDecision
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Whole characters, and the tokens that came since the last piece."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    # None where the answer has no text.
    ttft_seconds: float | None
    total_seconds: float
    stages: tuple[Stage, ...]


# `Started` once, any number of `Delta`s, `Finished` once.
Event = Started | Delta | Finished
