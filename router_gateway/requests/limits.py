"""The limits of a request, without a model or by its sizes; those of sampling alone are in `stitch.sampling`.

Every check raises InvalidRequest with the field, its value and its limit, and returns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized

from router_gateway.requests.types import Prompt, TokenIds
from router_gateway.routing.objectives import Objectives
from router_gateway.tokenization.chat_template import Turn
from stitch.cluster import RouteConfig
from stitch.errors import InvalidRequest
from stitch.sampling import Sampling

# An id appears in every log line about its request, on every shard.
MAX_ID_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1_024
MAX_ANSWERS = 16


class Amount(str):
    """A number with its unit; error messages show it without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def field_of(prompt: Prompt) -> str:
    """The request's field that holds such a prompt."""
    if isinstance(prompt, TokenIds):
        return "token_ids"
    return "prompt" if isinstance(prompt, str) else "chat"


def check_count(field: str, items: Sized, limit: int, unit: str) -> None:
    if len(items) > limit:
        raise InvalidRequest(field, Amount(f"{len(items):,} {unit}"), f"it holds at most {limit:,}")


def check_prompt(prompt: Prompt) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("prompt", prompt, "it must not be empty")
        return
    if isinstance(prompt, TokenIds):
        return
    if not prompt:
        raise InvalidRequest("chat.messages", Amount("empty"), "a conversation has at least one")
    for index, turn in enumerate(prompt):
        if not turn.role:
            raise InvalidRequest(f"chat.messages[{index}].role", turn.role, "every message needs a role")


def check_id(field: str, name: str) -> None:
    """Checks an id that a client chose: it is logged, or kept in memory."""
    check_count(field, name, MAX_ID_CHARACTERS, "characters")
    if not name.isprintable():
        raise InvalidRequest(field, name, "it must be printable")


def check_objectives(objectives: Objectives) -> None:
    seconds, cost, quality = objectives.max_ttft_seconds, objectives.max_cost, objectives.min_quality
    # NaN fails these comparisons; negated ones would accept it.
    if seconds is not None and not 0 < seconds < math.inf:
        raise InvalidRequest("objectives.max_ttft_seconds", seconds, "it must be above 0 and finite")
    if cost is not None and not 0 < cost <= 1:
        raise InvalidRequest("objectives.max_cost", cost, "it must be above 0 and at most 1, the costliest route's")
    if quality is not None and not math.isfinite(quality):
        raise InvalidRequest("objectives.min_quality", quality, "it must be finite")


def check_answers(n: int) -> None:
    if not 1 <= n <= MAX_ANSWERS:
        raise InvalidRequest("n", n, f"it must be at least 1 and at most {MAX_ANSWERS}")


def check_prompt_logprobs(sampling: Sampling, route: RouteConfig | None) -> None:
    """`route` is None where it is not known before a shard computes."""
    if sampling.logprobs is None:
        raise InvalidRequest("prompt_logprobs", True, "sampling.logprobs is not set")
    for field in ("presence_penalty", "frequency_penalty"):
        if penalty := getattr(sampling, field):
            raise InvalidRequest(f"sampling.{field}", penalty, "with the log-probabilities of the prompt it must be 0")
    if route is None:
        raise InvalidRequest("prompt_logprobs", True, "the request must name its route, since a probe decides here")
    if route.ffn_skip is not None:
        limit = f"route {route.name} has none: its gates would leave out FFNs of the prompt's tokens"
        raise InvalidRequest("prompt_logprobs", True, limit)


def check_threshold(threshold: float | None, route: str) -> None:
    """`route` is the one that the request names, empty where the router decides."""
    if threshold is None:
        return
    # NaN fails this comparison, too.
    if not 0 <= threshold <= 1:
        raise InvalidRequest("threshold", threshold, "it must be at least 0 and at most 1")
    if route:
        raise InvalidRequest("threshold", threshold, f"the request names route {route}, so that no router decides")


def check_stop(stop: Sequence[str]) -> None:
    check_count("stop", stop, MAX_STOP_STRINGS, "strings")
    for index, string in enumerate(stop):
        if not string:
            raise InvalidRequest(f"stop[{index}]", string, "a stop string has at least one character")
        check_count(f"stop[{index}]", string, MAX_STOP_CHARACTERS, "characters")


def check_tokens(field: str, ids: Iterable[int], vocabulary_size: int) -> None:
    for index, token_id in enumerate(ids):
        if token_id >= vocabulary_size:
            limit = f"the vocabulary ends at {vocabulary_size - 1:,}"
            raise InvalidRequest(f"{field}[{index}]", token_id, limit)


def check_text_tokens(field: str, ids: Iterable[int], vocabulary_size: int) -> None:
    """Refuses text with a token that the tokenizer has and a model has not."""
    if (largest := max(ids, default=0)) >= vocabulary_size:
        limit = f"the model's vocabulary ends at {vocabulary_size - 1:,}"
        raise InvalidRequest(field, Amount(f"a text with token {largest:,}"), limit)


def check_forced(answer: str, forced_token_ids: Sized, max_bytes: int) -> None:
    """Refuses a forced answer together with forced tokens, and one that can't fit, however it is tokenized."""
    if forced_token_ids:
        limit = "a forced answer already determines all tokens"
        raise InvalidRequest("sampling.forced_token_ids", Amount(f"{len(forced_token_ids):,} ids"), limit)
    if (size := len(answer.encode())) > max_bytes:
        limit = f"the context holds at most {max_bytes:,}"
        raise InvalidRequest("forced_answer", Amount(f"{size:,} bytes"), limit)


def check_answer_fits(tokens: int, room_tokens: int) -> None:
    """A forced answer has at least one token and fits into the context after the prompt."""
    if not 0 < tokens <= room_tokens:
        limit = f"it must have at least one, and after this prompt the context holds {room_tokens:,}"
        raise InvalidRequest("forced_answer", Amount(f"{tokens:,} tokens"), limit)


def check_size(prompt: str | tuple[Turn, ...], context_tokens: int, max_token_bytes: int) -> None:
    """Refuses text that can't fit, however it is tokenized, before it is tokenized."""
    size, max_bytes = size_bytes(prompt), context_tokens * max_token_bytes
    if size > max_bytes:
        limit = f"the context of {context_tokens:,} tokens holds at most {max_bytes:,}"
        raise InvalidRequest(field_of(prompt), Amount(f"{size:,} bytes"), limit)
    if not isinstance(prompt, str) and len(prompt) > context_tokens:
        limit = f"every message has tokens, and the context holds {context_tokens:,}"
        raise InvalidRequest("chat.messages", Amount(f"{len(prompt):,} messages"), limit)


def check_fits(prompt: Prompt, prompt_tokens: int, context_tokens: int) -> None:
    """Refuses an empty prompt, and one that leaves no room for a generated token."""
    if prompt_tokens == 0:
        raise InvalidRequest(field_of(prompt), Amount("0 tokens"), "it must have at least one")
    if prompt_tokens + 1 > context_tokens:
        limit = f"the context holds {context_tokens:,}, the answer included"
        raise InvalidRequest(field_of(prompt), Amount(f"{prompt_tokens:,} tokens"), limit)


def size_bytes(prompt: str | tuple[Turn, ...]) -> int:
    """UTF-8 bytes of all text in the prompt."""
    if isinstance(prompt, str):
        return len(prompt.encode())
    return sum(_turn_bytes(turn) for turn in prompt)


def _turn_bytes(turn: Turn) -> int:
    texts = turn.role, turn.content, turn.tool_call_id, turn.name
    return sum(len(text.encode()) for call in (texts, *turn.tool_calls) for text in call)
