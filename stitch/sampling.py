"""The sampling parameters of a request, their defaults and limits, and the token that a shard samples by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 1024
# Below it sampling is greedy: float32 logits could not be divided by it, and no second token would have a share.
MIN_TEMPERATURE = 1e-5

_REPEATED = ("stop_token_ids", "forced_token_ids")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a sampled token, and the most likely tokens at its position as `(id, logprob)`."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token."""

    id: int
    # In the sequence; the prompt's first token has position 0.
    position: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """A request's sampling with every default filled in; `from_proto` checks the limits."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # Alternatives reported for each token; None: no log-probabilities at all.
    logprobs: int | None = None
    # The first tokens of the answer, whatever their probability.
    forced_token_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are never sampled."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @classmethod
    def from_proto(cls, message: inference_pb2.Sampling) -> Sampling:
        """The parameters of a message, with the default for each field that is not set.

        Raises InvalidRequest for a value outside its limits.
        """
        given = {field.name: getattr(message, field.name) for field in fields(cls) if _is_set(message, field.name)}
        given |= {name: tuple(getattr(message, name)) for name in _REPEATED}
        sampling = cls(**given)
        sampling._check()
        return sampling

    def to_proto(self) -> inference_pb2.Sampling:
        """The message from which `from_proto` makes an equal object."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return inference_pb2.Sampling(**{name: value for name, value in given.items() if value is not None})

    def _check(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_below=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens < 1:
            raise InvalidRequest("sampling.max_tokens", self.max_tokens, "it must be at least 1")
        if self.logprobs is not None and self.logprobs > MAX_LOGPROBS:
            raise InvalidRequest("sampling.logprobs", self.logprobs, f"it must be at most {MAX_LOGPROBS}")


def _is_set(message: inference_pb2.Sampling, name: str) -> bool:
    if name in _REPEATED:
        return False
    return name == "ignore_eos" or message.HasField(name)


def _in_range(name: str, value: float, low: float, high: float, open_below: bool = False) -> None:
    inside = (low < value if open_below else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        above = "more than" if open_below else "at least"
        raise InvalidRequest(f"sampling.{name}", value, f"it must be {above} {low:g} and at most {high:g}")
