"""Generation by pipelines of whole models and stitched ones, with a KV cache: token ids in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from stitch.sampling import Sampling
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore, Span
from stitch_server.model.sampler import SampleRequest, sample
from stitch_training.scoring import Pipeline


@dataclass
class _Generation:
    """A prompt with its generated tokens, and its blocks in each stage's KV cache."""

    token_ids: list[int]
    blocks: range
    # Of its draws.
    seed: int = 0
    cached: int = 0
    generated: list[int] = field(default_factory=list)

    def span(self) -> Span:
        return Span(self.cached, len(self.token_ids) - self.cached, self.blocks)

    def append(self, token: int) -> None:
        self.cached = len(self.token_ids)
        self.token_ids.append(token)
        self.generated.append(token)

    def is_running(self, max_tokens: int, ends: Collection[int]) -> bool:
        return self.generated[-1] not in ends and len(self.generated) < max_tokens


# Chooses the next token of each generation by its logits `[generations, vocabulary]`.
_Choose = Callable[[Tensor, Sequence[_Generation]], list[int]]


@dataclass(frozen=True)
class Answer:
    """A sampled answer, with the token that ends it."""

    token_ids: list[int]
    # Whether its number of tokens ended it, and no end token.
    is_cut: bool


def generate_greedy(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], vocabulary: int, max_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """Generates from each prompt up to the first of the `ends` tokens, or `max_tokens` tokens, with a KV cache.

    Only the first `vocabulary` tokens are generated.
    """
    generations = list(_allocate(prompts, [0] * len(prompts), max_tokens))
    _generate(pipeline, generations, vocabulary, max_tokens, ends, _likeliest, lambda: False)
    return [one.generated for one in generations]


def generate_sampled(
    pipeline: Pipeline,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    vocabulary: int,
    max_tokens: int,
    ends: Collection[int],
    temperature: float,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Answer | None]:
    """Samples an answer to each prompt as a shard would: each token is drawn by the prompt's seed and its position.

    Generation stops once `is_over()`, which is called before every token; an answer without an end is None then.
    """

    def draw(logits: Tensor, generations: Sequence[_Generation]) -> list[int]:
        requests = [
            SampleRequest(Sampling(temperature=temperature, seed=one.seed), len(one.token_ids), (), len(one.token_ids))
            for one in generations
        ]
        return [token.id for token in sample(logits, requests)]

    generations = list(_allocate(prompts, seeds, max_tokens))
    _generate(pipeline, generations, vocabulary, max_tokens, ends, draw, is_over)
    return [
        Answer(one.generated, one.generated[-1] not in ends)
        if one.generated and not one.is_running(max_tokens, ends)
        else None
        for one in generations
    ]


def _generate(
    pipeline: Pipeline,
    generations: Sequence[_Generation],
    vocabulary: int,
    max_tokens: int,
    ends: Collection[int],
    choose: _Choose,
    is_over: Callable[[], bool],
) -> None:
    blocks = generations[-1].blocks.stop if generations else 0
    stores = [stage.model.new_store(stage.first, stage.end, blocks) for stage in pipeline.stages]
    with torch.no_grad():
        # Prompts are prefilled one by one; all at once would need the memory of a long batch.
        for generation in generations:
            if is_over():
                return
            _decode_step(pipeline, stores, vocabulary, [generation], choose)
        running = [one for one in generations if one.is_running(max_tokens, ends)]
        while running and not is_over():
            _decode_step(pipeline, stores, vocabulary, running, choose)
            running = [one for one in running if one.is_running(max_tokens, ends)]


def _likeliest(logits: Tensor, generations: Sequence[_Generation]) -> list[int]:
    ids: list[int] = logits.argmax(1).tolist()
    return ids


def _allocate(prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> Iterator[_Generation]:
    first = 0
    for prompt, seed in zip(prompts, seeds, strict=True):
        end = first - (-(len(prompt) + max_tokens) // BLOCK_TOKENS)
        yield _Generation(list(prompt), range(first, end), seed)
        first = end


def _decode_step(
    pipeline: Pipeline,
    stores: Sequence[KVStore],
    vocabulary: int,
    generations: Sequence[_Generation],
    choose: _Choose,
) -> None:
    """Generates one more token for each generation."""
    spans = [one.span() for one in generations]
    new_tokens = [token for one in generations for token in one.token_ids[one.cached :]]
    hidden = pipeline.stages[0].model.embed(torch.tensor(new_tokens))
    ends = list(accumulate(span.length for span in spans))
    decoded = [end - 1 for end, one in zip(ends, generations, strict=True) if one.generated]
    starts = [end - span.length for end, span in zip(ends, spans, strict=True) if span.position == 0]
    for index, (stage, store) in enumerate(zip(pipeline.stages, stores, strict=True)):
        hidden = pipeline.between(hidden, starts) if index else hidden
        hidden = stage.model.extend(hidden, spans, store, stage.adapters, stage.skip, decoded)
    last = (torch.tensor(ends) - 1).to(hidden.device)
    logits = pipeline.head.logits(hidden[last])[:, :vocabulary]
    for one, token in zip(generations, choose(logits, generations), strict=True):
        one.append(token)
