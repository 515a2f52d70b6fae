"""A client's request as values. Answers are the client protocol's own messages, `GenerateResponse` and its parts."""

from __future__ import annotations

from dataclasses import dataclass

from router_gateway.routing.selector import NO_OPTIONS, RoutingOptions
from router_gateway.tokenization.chat_template import Tool, Turn
from stitch.grammar import Grammar
from stitch.sampling import Sampling


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that is tokenized already."""

    ids: tuple[int, ...]


# Plain text, tokenized as it is, a conversation for the model's chat template, or tokens.
Prompt = str | tuple[Turn, ...] | TokenIds


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that the model may call."""

    offered: tuple[Tool, ...]
    # Whether the answer is a call.
    required: bool = False
    # The only tool that may be called; empty: each.
    name: str = ""
    # Whether one answer may call several tools.
    parallel: bool = True

    @property
    def size_bytes(self) -> int:
        """About the size of their text."""
        return sum(len(repr(tool)) for tool in self.offered)


@dataclass(frozen=True, slots=True)
class Request:
    request_id: str
    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...] = ()
    routing: RoutingOptions = NO_OPTIONS
    # The complete text of the answer; None: the model generates it.
    forced_answer: str | None = None
    # Whether the client has set `sampling.max_tokens`; where not, a tenant's limit lowers the default.
    sets_max_tokens: bool = True
    # What the answer matches, unless it calls tools.
    response_format: Grammar | None = None
    tools: Tools | None = None
    # The number of answers.
    n: int = 1
    # Whether the log-probabilities of the prompt's tokens are reported, too.
    prompt_logprobs: bool = False


def user_turns(prompt: str | tuple[Turn, ...]) -> tuple[str, ...]:
    """The user's texts, oldest first; a plain prompt is one."""
    if isinstance(prompt, str):
        return (prompt,)
    return tuple(turn.content for turn in prompt if turn.role == "user")
