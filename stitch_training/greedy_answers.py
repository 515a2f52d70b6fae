"""Greedy answers of a system, many at once. Knows no file and no gold.

A prompt is computed once; what each leg's layers leave in their KV store serves every token behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.span import Span
from stitch_server.kv_cache.store import KVStore
from stitch_training.scoring import System


@dataclass
class _Dialogue:
    """A prompt with what is said to it."""

    token_ids: list[int]
    blocks: range
    cached: int = 0
    answer: list[int] = field(default_factory=list)

    def span(self) -> Span:
        return Span(self.cached, len(self.token_ids) - self.cached, self.blocks)

    def say(self, token: int) -> None:
        self.cached = len(self.token_ids)
        self.token_ids.append(token)
        self.answer.append(token)


def answers(
    system: System, prompts: Sequence[Sequence[int]], vocabulary: int, most_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """The likeliest of `vocabulary` tokens behind each prompt, up to the first of `ends` or `most_tokens` of them."""
    dialogues = list(_begun(prompts, most_tokens))
    blocks = dialogues[-1].blocks.stop if dialogues else 0
    stores = [leg.model.new_store(leg.first, leg.end, blocks) for leg in system.legs]
    with torch.no_grad():
        # Prompts one by one: all of them at once would need the memory of a long batch.
        for dialogue in dialogues:
            _advance(system, stores, vocabulary, [dialogue])
        open_ones = [one for one in dialogues if _goes_on(one, most_tokens, ends)]
        while open_ones:
            _advance(system, stores, vocabulary, open_ones)
            open_ones = [one for one in open_ones if _goes_on(one, most_tokens, ends)]
    return [one.answer for one in dialogues]


def _begun(prompts: Sequence[Sequence[int]], most_tokens: int) -> Iterator[_Dialogue]:
    first = 0
    for prompt in prompts:
        end = first - (-(len(prompt) + most_tokens) // BLOCK_TOKENS)
        yield _Dialogue(list(prompt), range(first, end))
        first = end


def _goes_on(dialogue: _Dialogue, most_tokens: int, ends: Collection[int]) -> bool:
    return dialogue.answer[-1] not in ends and len(dialogue.answer) < most_tokens


def _advance(system: System, stores: Sequence[KVStore], vocabulary: int, dialogues: Sequence[_Dialogue]) -> None:
    """One more token for each."""
    spans = [one.span() for one in dialogues]
    fresh = [token for one in dialogues for token in one.token_ids[one.cached :]]
    hidden = system.legs[0].model.embed(torch.tensor(fresh))
    ends = list(accumulate(span.length for span in spans))
    begins = [end - span.length for end, span in zip(ends, spans, strict=True) if span.position == 0]
    for index, (leg, store) in enumerate(zip(system.legs, stores, strict=True)):
        hidden = leg.model.extend(system.between(hidden, begins) if index else hidden, spans, store, leg.adapters)
    last = torch.tensor(ends) - 1
    chosen: Tensor = system.head.logits(hidden[last])[:, :vocabulary].argmax(1)
    for one, token in zip(dialogues, chosen.tolist(), strict=True):
        one.say(token)
