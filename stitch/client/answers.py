"""From response messages to answers. Knows no connection: both clients feed it what they receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from stitch.errors import Unavailable
from stitch.v1 import inference_pb2

FinishReason = Literal["stop", "length"]

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}

# In the order in which a request passes them.
_STAGES = ("route", "queue", "bottom_prefill", "wire", "stitch", "top_prefill", "sample")


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """What the router made of a query; the first event of every stream."""

    route: str
    # How much the query asks for the strongest route, 0 to 1.
    score: float
    reason: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Alternative:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    token_id: int
    logprob: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer: whole characters, and the tokens behind them."""

    text: str
    token_ids: tuple[int, ...]
    # One entry a token where log-probabilities were asked for, else none.
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Durations are the gateway's, counted from the request's arrival there."""

    text: str
    token_ids: tuple[int, ...]
    route: str
    score: float
    reason: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    # None where the answer has no text.
    ttft_seconds: float | None
    total_seconds: float
    # Where the time to the first token went, in seconds by stage.
    stages: dict[str, float]
    logprobs: tuple[TokenLogprobs, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The answer as plain JSON values; `logprobs` only where they were asked for."""
        fields = {name: getattr(self, name) for name in _JSON_FIELDS}
        fields["token_ids"] = list(self.token_ids)
        if self.logprobs:
            fields["logprobs"] = [_logprobs_json(token) for token in self.logprobs]
        return fields


_JSON_FIELDS = (
    *("text", "token_ids", "route", "score", "reason", "prompt_tokens", "generated_tokens"),
    *("finish_reason", "ttft_seconds", "total_seconds", "stages"),
)


@dataclass(slots=True)
class Collector:
    """Puts one answer together from the events of its stream."""

    decision: RouteDecision | None = None
    deltas: list[Delta] = field(default_factory=list)
    finished: inference_pb2.Finished | None = None

    def take(self, response: inference_pb2.GenerateResponse) -> RouteDecision | Delta | None:
        """The event that this message means to a reader of the stream, if any."""
        match response.WhichOneof("event"):
            case "started":
                self.decision = decision_of(response.started)
                return self.decision
            case "delta":
                self.deltas.append(_delta(response.delta))
                return self.deltas[-1]
            case "finished":
                self.finished = response.finished
        return None

    def answer(self) -> Answer:
        """The whole answer; Unavailable where its stream ended too early."""
        tokens = tuple(token for delta in self.deltas for token in delta.token_ids)
        if self.decision is None or self.finished is None:
            raise Unavailable(f"the answer's stream ended after {len(tokens)} tokens, before its end", len(tokens))
        return Answer(
            text="".join(delta.text for delta in self.deltas),
            token_ids=tokens,
            route=self.decision.route,
            score=self.decision.score,
            reason=self.decision.reason,
            logprobs=tuple(token for delta in self.deltas for token in delta.logprobs),
            **_ending(self.finished),
        )


def decision_of(message: inference_pb2.Started | inference_pb2.RouteResponse) -> RouteDecision:
    """The judgement that either message carries."""
    made = message.decision
    return RouteDecision(made.route, made.score, made.reason, message.prompt_tokens)


def _ending(finished: inference_pb2.Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "generated_tokens": finished.generated_tokens,
        "finish_reason": _FINISH_REASONS.get(finished.reason, "stop"),
        "ttft_seconds": finished.ttft_seconds if finished.HasField("ttft_seconds") else None,
        "total_seconds": finished.total_seconds,
        "stages": {stage.name: stage.seconds for stage in sorted(finished.stages, key=_place)},
    }


def _place(stage: inference_pb2.Stage) -> int:
    # A stage that a newer gateway knows comes behind those that are known here.
    return _STAGES.index(stage.name) if stage.name in _STAGES else len(_STAGES)


def _delta(message: inference_pb2.Delta) -> Delta:
    return Delta(message.text, tuple(message.token_ids), _logprobs(message.logprobs))


def _logprobs(tokens: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token.token_id, token.logprob, _alternatives(token)) for token in tokens)


def _alternatives(token: inference_pb2.TokenLogprobs) -> tuple[Alternative, ...]:
    return tuple(Alternative(other.token_id, other.logprob) for other in token.alternatives)


def _logprobs_json(token: TokenLogprobs) -> dict[str, Any]:
    alternatives = [{"token_id": other.token_id, "logprob": other.logprob} for other in token.alternatives]
    return {"token_id": token.token_id, "logprob": token.logprob, "alternatives": alternatives}
