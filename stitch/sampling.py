"""The sampling parameters of a request, their defaults and limits, and the token that a shard samples by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from hashlib import blake2b

from stitch.errors import InvalidRequest
from stitch.v1 import inference_pb2

MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1_024
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
    # Token ids, ascending, each with what is added to its logit.
    logit_bias: tuple[tuple[int, float], ...] = ()
    # No end token and no stop string ends the answer before it has this many tokens.
    min_tokens: int = 0

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

    def ends_at(self, token_id: int, generated: int) -> bool:
        """Whether this token, the last one of `generated`, ends the answer as an end token."""
        return token_id in self.stop_token_ids and generated > self.min_tokens

    def of_answer(self, index: int) -> Sampling:
        """The sampling of one of several answers to a request; the first one has the request's own seed."""
        if index == 0:
            return self
        digest = blake2b(self.seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest, "little"))

    @classmethod
    def from_proto(cls, message: inference_pb2.Sampling) -> Sampling:
        """The parameters of a message, with the default for each field that is not set.

        Raises InvalidRequest for a value outside its limits.
        """
        given = {field.name: getattr(message, field.name) for field in fields(cls) if _is_set(message, field.name)}
        given |= {name: tuple(getattr(message, name)) for name in _REPEATED}
        given["logit_bias"] = tuple(sorted(message.logit_bias.items()))
        sampling = cls(**given)
        sampling._check()
        return sampling

    def to_proto(self) -> inference_pb2.Sampling:
        """The message from which `from_proto` makes an equal object."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["logit_bias"] = dict(self.logit_bias)
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
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            entries = f"{len(self.logit_bias):,} entries"
            raise InvalidRequest("sampling.logit_bias", entries, f"it holds at most {MAX_BIASED_TOKENS:,}")
        for token_id, bias in self.logit_bias:
            _in_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest("sampling.min_tokens", self.min_tokens, f"it must be at most {self.max_tokens:,}")


def _is_set(message: inference_pb2.Sampling, name: str) -> bool:
    if name in (*_REPEATED, "logit_bias"):
        return False
    return name in ("ignore_eos", "min_tokens") or message.HasField(name)


def _in_range(name: str, value: float, low: float, high: float, open_below: bool = False) -> None:
    inside = (low < value if open_below else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        above = "more than" if open_below else "at least"
        raise InvalidRequest(f"sampling.{name}", value, f"it must be {above} {low:g} and at most {high:g}")
