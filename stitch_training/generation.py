"""Greedy generation by pipelines of whole models and stitched ones, with a KV cache: token ids in, answers out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore, Span
from stitch_training.scoring import Pipeline


@dataclass
class _Generation:
    """A prompt with its generated tokens, and its blocks in each stage's KV cache."""

    token_ids: list[int]
    blocks: range
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


def generate_greedy(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], vocabulary: int, max_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """Generates from each prompt up to the first of the `ends` tokens, or `max_tokens` tokens, with a KV cache.

    Only the first `vocabulary` tokens are generated.
    """
    generations = list(_allocate(prompts, max_tokens))
    blocks = generations[-1].blocks.stop if generations else 0
    stores = [stage.model.new_store(stage.first, stage.end, blocks) for stage in pipeline.stages]
    with torch.no_grad():
        # Prompts are prefilled one by one; all at once would need the memory of a long batch.
        for generation in generations:
            _decode_step(pipeline, stores, vocabulary, [generation])
        running = [one for one in generations if one.is_running(max_tokens, ends)]
        while running:
            _decode_step(pipeline, stores, vocabulary, running)
            running = [one for one in running if one.is_running(max_tokens, ends)]
    return [one.generated for one in generations]


def _allocate(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[_Generation]:
    first = 0
    for prompt in prompts:
        end = first - (-(len(prompt) + max_tokens) // BLOCK_TOKENS)
        yield _Generation(list(prompt), range(first, end))
        first = end


def _decode_step(
    pipeline: Pipeline, stores: Sequence[KVStore], vocabulary: int, generations: Sequence[_Generation]
) -> None:
    """Generates one more token for each generation."""
    spans = [one.span() for one in generations]
    new_tokens = [token for one in generations for token in one.token_ids[one.cached :]]
    hidden = pipeline.stages[0].model.embed(torch.tensor(new_tokens))
    ends = list(accumulate(span.length for span in spans))
    starts = [end - span.length for end, span in zip(ends, spans, strict=True) if span.position == 0]
    for index, (stage, store) in enumerate(zip(pipeline.stages, stores, strict=True)):
        hidden = pipeline.between(hidden, starts) if index else hidden
        hidden = stage.model.extend(hidden, spans, store, stage.adapters)
    last = (torch.tensor(ends) - 1).to(hidden.device)
    sampled: Tensor = pipeline.head.logits(hidden[last])[:, :vocabulary].argmax(1)
    for one, token in zip(generations, sampled.tolist(), strict=True):
        one.append(token)
