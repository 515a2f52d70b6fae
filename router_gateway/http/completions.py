"""`POST /v1/completions`: prompts as text or token ids in, OpenAI's text completion or its chunks out.

With `echo` each text begins with its prompt. With `logprobs`, too, the prompt's tokens have log-probabilities: all but
the first one, which follows nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from router_gateway.http.bodies import Items
from router_gateway.http.calls import Call, Services
from router_gateway.http.generation import (
    DONE,
    FINISH_REASONS,
    MAX_INT32,
    ChoicesBody,
    Shape,
    TokenId,
    compact,
    generated,
    message_of,
    respond,
)
from router_gateway.requests.deltas import interleaved
from router_gateway.requests.types import TokenIds
from stitch.errors import InvalidRequest
from stitch.sampling import MAX_LOGPROBS
from stitch.v1 import inference_pb2

MAX_PROMPTS = 128
# OpenAI's.
DEFAULT_MAX_TOKENS = 16

Response = inference_pb2.GenerateResponse
Ids = Annotated[Items[TokenId], Field(min_length=1)]
Texts = Annotated[Items[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Lists = Annotated[Items[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]


def _kind(prompt: object) -> str:
    """The alternative whose errors say what is wrong with a prompt."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "ids" if isinstance(first, int) else "lists" if isinstance(first, list) else "texts"


class CompletionBody(ChoicesBody):
    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[Texts, Tag("texts")]
        | Annotated[Lists, Tag("lists")],
        Discriminator(_kind),
    ]
    # 0 only with `echo`, which then returns the prompt alone.
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | TokenIds]:
        """One or more, none of which is empty."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        whole = [one for one in self.prompt if isinstance(one, int)]
        if whole:
            return [TokenIds(tuple(whole))]
        return [
            one if isinstance(one, str) else TokenIds(tuple(one)) for one in self.prompt if not isinstance(one, int)
        ]

    @property
    def tokens(self) -> int:
        """The most of one answer."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens have log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def check(self) -> None:
        """Raises InvalidRequest for fields that exclude or need each other."""
        if not self.tokens and not self.echo:
            raise InvalidRequest("max_tokens", 0, "without echo it must be at least 1")
        if self.scores_prompt and (self.n or 1) > 1:
            raise InvalidRequest("n", self.n, "with echo and logprobs it must be 1")


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    # Tokens of the prompt whose log-probabilities are to come.
    prompt_left: int = 0
    # The characters of the tokens so far; the last one may be incomplete.
    characters: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: bytes, logprob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(_name(token))
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(self.characters)
        self.characters += len(self.decoder.decode(token))

    def add_delta(self, delta: inference_pb2.Delta, prompt_alone: bool) -> None:
        """Takes the text and the tokens of a delta, or of those the prompt's alone."""
        self.text += "" if prompt_alone else delta.text
        for one in delta.logprobs[: self.prompt_left] if prompt_alone else delta.logprobs:
            top = {_name(other.token): other.logprob for other in one.alternatives}
            # The token itself is there also where it isn't among the likeliest.
            self.add(one.token, one.logprob, {**top, _name(one.token): one.logprob})
        self.prompt_left = max(0, self.prompt_left - len(delta.logprobs))

    def logprobs(self) -> dict[str, Any]:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: getattr(self, name) for name in names}

    def take(self) -> None:
        """Forgets what has been sent."""
        self.text = ""
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []


class CompletionShape(Shape):
    """Text completions and their chunks. The answers to one prompt are consecutive choices."""

    def __init__(
        self, request_id: str, body: CompletionBody, beginnings: Sequence[tuple[str, Sequence[bytes]]]
    ) -> None:
        """`beginnings`: with `echo`, the text of each prompt and its tokens' bytes."""
        super().__init__(request_id)
        self.include_usage = body.include_usage
        self._with_logprobs, self._prompt_alone = body.logprobs is not None, not body.tokens
        self._answers = body.n or 1
        self._prompt_tokens = 0
        self._has_started = False
        self._choices = [_Choice() for _ in range(len(body.prompts) * self._answers)]
        for index, choice in enumerate(self._choices if beginnings else ()):
            choice.text, tokens = beginnings[index // self._answers]
            if body.scores_prompt:
                choice.add(tokens[0], None, None)
                choice.prompt_left = len(tokens) - 1

    def start(self, started: inference_pb2.Started) -> None:
        if not self._has_started:
            super().start(started)
        self._has_started = True
        self._prompt_tokens += started.prompt_tokens

    def add(self, response: Response) -> None:
        # A token is generated also where nobody asks for one: an answer has at least that.
        self._choices[response.answer].add_delta(response.delta, self._prompt_alone)

    def events(self, response: Response) -> bytes:
        self.add(response)
        choice, ended = self._choices[response.answer], response.HasField("finished")
        if not (choice.text or choice.tokens or ended):
            return b""
        found = self._choice(response.answer)
        choice.take()
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        is_last = ended and not self.include_usage and len(self._finished) == len(self._choices)
        stitch = {"stitch": self.stitch()} if is_last else {}
        return _event({**self._head(), "choices": [found], **usage, **stitch})

    def last_events(self) -> bytes:
        if not self.include_usage:
            return DONE
        return _event({**self._head(), "choices": [], "usage": self.usage(), "stitch": self.stitch()}) + DONE

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(len(self._choices))]
        return {**self._head(), "choices": choices, "usage": self.usage(), "stitch": self.stitch()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts, each of which is computed once, and of all answers."""
        usage = super().usage()
        generated = 0 if self._prompt_alone else usage["completion_tokens"]
        cached = sum(end.cached_tokens for index, end in self._finished.items() if index % self._answers == 0)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self) -> dict[str, Any]:
        route = self.started.decision.route
        return {"id": f"cmpl-{self.request_id}", "object": "text_completion", "created": self.created, "model": route}

    def _choice(self, index: int) -> dict[str, Any]:
        choice, finished = self._choices[index], self._finished.get(index)
        finish = None if finished is None else FINISH_REASONS[finished.reason]
        if finish is not None and self._prompt_alone:
            finish = "length"
        logprobs = choice.logprobs() if self._with_logprobs else None
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": finish}


async def completions(services: Services, call: Call, body: CompletionBody) -> None:
    """Completes prompts."""
    body.check()
    given, answers = message_of(call, services, body), body.n or 1
    given.sampling.max_tokens = max(1, body.tokens)
    if body.logprobs is not None:
        given.sampling.logprobs = body.logprobs
    given.prompt_logprobs = body.scores_prompt
    running = []
    for index, prompt in enumerate(body.prompts):
        message = inference_pb2.GenerateRequest()
        message.CopyFrom(given)
        if isinstance(prompt, TokenIds):
            message.token_ids.ids.extend(prompt.ids)
        else:
            message.prompt = prompt
        running.append(_numbered(generated(call, services, message), index * answers))
    beginnings = [await _beginning(call, services, one) for one in body.prompts] if body.echo else []
    responses = running[0] if len(running) == 1 else interleaved(running)
    await respond(call, responses, bool(body.stream), CompletionShape(call.request_id, body, beginnings))


async def _beginning(call: Call, services: Services, prompt: str | TokenIds) -> tuple[str, Sequence[bytes]]:
    """The text of a prompt, and the bytes of its tokens."""
    found = await services.pipeline.tokenize(call.credentials, prompt)
    if isinstance(prompt, str):
        return prompt, found.tokens
    return await services.pipeline.detokenize(call.credentials, list(prompt.ids)), found.tokens


async def _numbered(responses: AsyncGenerator[Response, None], first: int) -> AsyncGenerator[Response, None]:
    """The messages of one prompt, whose first answer is the choice `first`."""
    async with aclosing(responses):
        async for response in responses:
            response.answer += first
            yield response


def _name(token: bytes) -> str:
    """A token as OpenAI names it; a part of a character is `bytes:` and its bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + compact(content) + b"\n\n"
