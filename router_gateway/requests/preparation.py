"""From a request to token ids, a route and a full sampling. Knows no shard's address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from router_gateway.requests import limits
from router_gateway.requests.types import Prompt, Request
from router_gateway.routing.router import DeferredDecision, RouteDecision
from router_gateway.routing.selector import Selection
from router_gateway.shards.models import ModelRegistry
from router_gateway.tokenization.chat_template import TemplateRefusal
from router_gateway.tokenization.source import VocabularySource
from router_gateway.tokenization.vocabulary import Vocabulary
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest, shown
from stitch.sampling import Sampling

# Tokenizing so much takes about a millisecond; what is larger goes to a thread, so that the event loop stays free.
INLINE_BYTES = 2_048


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as shards understand it."""

    request: Request
    token_ids: tuple[int, ...]
    decision: RouteDecision | DeferredDecision
    # max_tokens ends with the context at the latest; the model's own end tokens are among stop_token_ids.
    sampling: Sampling
    vocabulary: Vocabulary


class Preparation:
    """Validates, tokenizes and judges; every refusal comes from here, before a shard is asked."""

    def __init__(
        self,
        cluster: ClusterConfig,
        catalogue: ModelRegistry,
        source: VocabularySource,
        selection: Selection,
        threads: Executor,
    ) -> None:
        self._cluster = cluster
        self._catalogue = catalogue
        self._source = source
        self._selection = selection
        self._threads = threads

    async def prepare(self, request: Request, waited_seconds: Callable[[], float] = lambda: 0.0) -> Prepared:
        """Raises InvalidRequest, ObjectivesUnmet, or Unavailable before the first shard has answered.

        `waited_seconds` says how long ago the request came.
        """
        if request.route is not None:
            self._cluster.route(request.route)
        vocabulary = self._vocabulary(request.prompt)
        for field in ("stop_token_ids", "forced_token_ids"):
            limits.check_tokens(field, getattr(request.sampling, field), self._catalogue.vocabulary_size)
        ids = await self._tokenize(request.prompt, vocabulary)
        asked = request.sampling
        if request.forced_answer is not None:
            asked = await self._forced(request.forced_answer, asked, len(ids), vocabulary)
        sampling = complete(asked, len(ids), self._catalogue.context_tokens, vocabulary.end_tokens)
        decision = self._selection.select(request, len(ids), waited_seconds())
        return Prepared(request, tuple(ids), decision, sampling, vocabulary)

    def _vocabulary(self, prompt: Prompt) -> Vocabulary:
        limits.check_prompt(prompt)
        return self._source.require()

    async def _tokenize(self, prompt: Prompt, vocabulary: Vocabulary) -> list[int]:
        context_tokens = self._catalogue.context_tokens
        limits.check_size(prompt, context_tokens, vocabulary.longest_token_bytes)
        ids = await self._encode(prompt, lambda: tokenize(prompt, vocabulary))
        limits.check_fits(prompt, len(ids), context_tokens)
        return ids

    async def _encode(self, text: Prompt, encode: Callable[[], list[int]]) -> list[int]:
        if limits.size_bytes(text) <= INLINE_BYTES:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    async def _forced(self, answer: str, sampling: Sampling, prompt_tokens: int, vocabulary: Vocabulary) -> Sampling:
        """The sampling that gives this answer and ends behind it."""
        context_tokens = self._catalogue.context_tokens
        limits.check_forced(answer, sampling.forced_token_ids, context_tokens * vocabulary.longest_token_bytes)
        ids = await self._encode(answer, lambda: vocabulary.encode_rendered(answer))
        limits.check_answer_fits(len(ids), context_tokens - prompt_tokens)
        return replace(sampling, forced_token_ids=tuple(ids), max_tokens=min(sampling.max_tokens, len(ids)))


def tokenize(prompt: Prompt, vocabulary: Vocabulary) -> list[int]:
    """Raises InvalidRequest where the chat template refuses the conversation."""
    if isinstance(prompt, str):
        return vocabulary.encode(prompt)
    roles = ", ".join(turn.role for turn in prompt)
    if vocabulary.template is None:
        raise InvalidRequest("chat", roles, "the model has no chat template, so it takes a prompt only")
    try:
        rendered = vocabulary.template.render([(turn.role, turn.content) for turn in prompt])
    except TemplateRefusal as error:
        raise InvalidRequest("chat", roles, f"the chat template refuses it: {shown(str(error), 200)}") from error
    return vocabulary.encode_rendered(rendered)


def complete(sampling: Sampling, prompt_tokens: int, context_tokens: int, end_tokens: tuple[int, ...]) -> Sampling:
    """With max_tokens cut at the context's end, and the model's end tokens unless they are to be ignored."""
    stop = sampling.stop_token_ids
    if not sampling.ignore_eos:
        stop = tuple(dict.fromkeys((*stop, *end_tokens)))
    return replace(sampling, max_tokens=min(sampling.max_tokens, context_tokens - prompt_tokens), stop_token_ids=stop)
