"""The events of the Inference service as Python values, and the answers that they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from stitch.errors import Unavailable
from stitch.v1 import inference_pb2

FinishReason = Literal["stop", "length", "tool_calls"]

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

# In the order in which a request goes through them.
_STAGES = ("route", "queue", "bottom_prefill", "wire", "stitch", "top_prefill", "sample")


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """The route of a query and why the router chose it; the first event of every stream."""

    route: str
    # How much the query needs the strongest route, 0 to 1.
    score: float
    reason: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Alternative:
    token_id: int
    logprob: float
    # Its bytes, which may be a part of a character.
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    token_id: int
    logprob: float
    alternatives: tuple[Alternative, ...]
    # Its bytes, which may be a part of a character.
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model."""

    id: str
    name: str
    # A JSON object.
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer: whole characters, and the tokens that they were decoded from."""

    text: str
    token_ids: tuple[int, ...]
    # One entry per token where the request asked for log-probabilities, else none.
    logprobs: tuple[TokenLogprobs, ...]
    # The answer that it belongs to, from 0.
    answer: int = 0
    # The calls that are whole now.
    tool_calls: tuple[ToolCall, ...] = ()


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
    # The parts of the time to the first token, in seconds by stage.
    stages: dict[str, float]
    logprobs: tuple[TokenLogprobs, ...] = ()
    # Prompt tokens whose KV was cached already.
    cached_tokens: int = 0
    # How often the answer went on with other shards.
    replays: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    # The further answers of a request for several.
    others: tuple[Answer, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The answer as plain JSON values; `logprobs`, `tool_calls` and `others` only where there are some."""
        fields = {name: getattr(self, name) for name in _JSON_FIELDS}
        fields["token_ids"] = list(self.token_ids)
        if self.logprobs:
            fields["logprobs"] = [_logprobs_json(token) for token in self.logprobs]
        if self.tool_calls:
            fields["tool_calls"] = [asdict(call) for call in self.tool_calls]
        if self.others:
            fields["others"] = [other.as_json() for other in self.others]
        return fields


_JSON_FIELDS = (
    *("text", "token_ids", "route", "score", "reason", "prompt_tokens", "generated_tokens"),
    *("finish_reason", "ttft_seconds", "total_seconds", "stages", "cached_tokens", "replays"),
)


@dataclass(slots=True)
class Collector:
    """Assembles the answers of a request from the events of its stream."""

    decision: RouteDecision | None = None
    deltas: list[Delta] = field(default_factory=list)
    # By answer.
    ends: dict[int, inference_pb2.Finished] = field(default_factory=dict)

    def add(self, response: inference_pb2.GenerateResponse) -> RouteDecision | Delta | None:
        """Adds the event of one message and returns it; None for one that ends an answer."""
        match response.WhichOneof("event"):
            case "started":
                self.decision = decision_of(response.started)
                return self.decision
            case "delta":
                self.deltas.append(_delta(response.delta, response.answer))
                return self.deltas[-1]
            case "finished":
                self.ends[response.answer] = response.finished
        return None

    @property
    def is_complete(self) -> bool:
        """Whether every answer that has started has ended, and the first one has."""
        return {0, *(delta.answer for delta in self.deltas)} <= self.ends.keys()

    def answer(self) -> Answer:
        """The first answer with the others; raises Unavailable where the stream ended before a `finished` event."""
        if self.decision is None or not self.is_complete:
            tokens = sum(len(delta.token_ids) for delta in self.deltas)
            raise Unavailable(f"the stream of the answer broke off after {tokens} tokens", tokens)
        first, *others = (self._answer(self.decision, index) for index in sorted(self.ends))
        return replace(first, others=tuple(others))

    def _answer(self, decision: RouteDecision, index: int) -> Answer:
        deltas = [delta for delta in self.deltas if delta.answer == index]
        return Answer(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            route=decision.route,
            score=decision.score,
            reason=decision.reason,
            logprobs=tuple(token for delta in deltas for token in delta.logprobs),
            tool_calls=tuple(call for delta in deltas for call in delta.tool_calls),
            **_finished_fields(self.ends[index]),
        )


def decision_of(message: inference_pb2.Started | inference_pb2.RouteResponse) -> RouteDecision:
    """The route decision that either message carries."""
    decision = message.decision
    return RouteDecision(decision.route, decision.score, decision.reason, message.prompt_tokens)


def _finished_fields(finished: inference_pb2.Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "generated_tokens": finished.generated_tokens,
        "finish_reason": _FINISH_REASONS.get(finished.reason, "stop"),
        "ttft_seconds": finished.ttft_seconds if finished.HasField("ttft_seconds") else None,
        "total_seconds": finished.total_seconds,
        "stages": {stage.name: stage.seconds for stage in sorted(finished.stages, key=_stage_order)},
        "cached_tokens": finished.cached_tokens,
        "replays": finished.replays,
    }


def _stage_order(stage: inference_pb2.Stage) -> int:
    # A stage that only a newer gateway has follows the known ones.
    return _STAGES.index(stage.name) if stage.name in _STAGES else len(_STAGES)


def _delta(message: inference_pb2.Delta, answer: int) -> Delta:
    # This gateway sends each call in one piece.
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
    return Delta(message.text, tuple(message.token_ids), _logprobs(message.logprobs), answer, calls)


def _logprobs(tokens: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(one.token_id, one.logprob, _alternatives(one), one.token) for one in tokens)


def _alternatives(token: inference_pb2.TokenLogprobs) -> tuple[Alternative, ...]:
    return tuple(Alternative(other.token_id, other.logprob, other.token) for other in token.alternatives)


def _logprobs_json(token: TokenLogprobs) -> dict[str, Any]:
    return {**_token_json(token), "alternatives": [_token_json(other) for other in token.alternatives]}


def _token_json(token: TokenLogprobs | Alternative) -> dict[str, Any]:
    return {"token_id": token.token_id, "token": token.token.decode(errors="replace"), "logprob": token.logprob}
