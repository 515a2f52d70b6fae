"""Exact match with gold answers, and greedy generation with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stitch_server.model.adapters import Adapters
from stitch_training import evaluate
from stitch_training.evaluate import ExactMatch, Question, generate_greedy
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import FolderEncoder, Pair
from stitch_training.scoring import Pipeline, stitched, whole, without_layers
from tests.support.tiny_fit import drawn_sequences, tiny_pair

ANSWERS = {"2 + 3": "It is 5.", "2 + 4": "I say 5, no, 7", "the capital": "Paris, of course"}


class Letters:
    """An encoder whose tokens are characters."""

    ends = frozenset({0})

    def encode_question(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def test_exact_match_is_the_share_of_answers_that_state_the_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(pipeline: Pipeline, prompts: Sequence[Sequence[int]], *settings: Any) -> list[list[int]]:
        assert settings == (256, 40, {0})
        return [list(map(ord, ANSWERS["".join(map(chr, prompt))])) for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate_greedy", generated)
    golds = zip(ANSWERS, ("#### 5", "#### 6", "Paris"), strict=True)
    exact_match = ExactMatch(cast(FolderEncoder, Letters()), [Question(*one) for one in golds], 256, 40)
    share = exact_match.measure(cast(Pipeline, None), lambda done, total: None)
    assert share is not None
    assert share.mean == pytest.approx(2 / 3)
    none = ExactMatch(exact_match.encoder, [], 256, 40)
    assert none.measure(cast(Pipeline, None), lambda done, total: None) is None


# Tokens that both tiny models have.
VOCABULARY = 60
MAX_TOKENS = 12


@pytest.fixture(params=["whole", "stitched", "first token set, adapted", "without layers"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Pipeline:
    pair: Pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    draw_more = torch.Generator().manual_seed(1)
    set_first = replace(stitch, first=torch.randn(32, generator=draw_more).double())
    adapters = Adapters(1, torch.randn(1, 2, 32, generator=draw_more), torch.randn(1, 32, 2, generator=draw_more))
    pipelines = {
        "whole": whole(pair.bottom),
        "stitched": stitched(pair, CutPoint(2, 1), stitch),
        "first token set, adapted": stitched(pair, CutPoint(2, 1), set_first, adapters),
        "without layers": without_layers(pair.bottom, CutPoint(1, 2)),
    }
    return pipelines[request.param]


def prompts() -> list[list[int]]:
    """Returns prompts of different lengths."""
    return [list(sequence.token_ids)[: 5 + 9 * index] for index, sequence in enumerate(drawn_sequences(3, 0))]


def without_cache(pipeline: Pipeline, prompt: list[int], count: int) -> list[int]:
    """Returns greedy tokens computed without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(pipeline.head.logits(pipeline.states(torch.tensor([ids]))[0, -1:])[:, :VOCABULARY].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_equals_one_without_a_cache(pipeline: Pipeline) -> None:
    expected = [without_cache(pipeline, prompt, MAX_TOKENS) for prompt in prompts()]
    assert generate_greedy(pipeline, prompts(), VOCABULARY, MAX_TOKENS, ()) == expected
    assert [generate_greedy(pipeline, [prompt], VOCABULARY, MAX_TOKENS, ())[0] for prompt in prompts()] == expected


def test_end_token_ends_its_own_generation_only(pipeline: Pipeline) -> None:
    full = generate_greedy(pipeline, prompts(), VOCABULARY, MAX_TOKENS, ())
    end = full[1][3]
    first_ends = [one.index(end) + 1 if end in one else MAX_TOKENS for one in full]
    assert generate_greedy(pipeline, prompts(), VOCABULARY, MAX_TOKENS, {end}) == [
        one[:n] for one, n in zip(full, first_ends, strict=True)
    ]


def test_no_prompts_generate_nothing(pipeline: Pipeline) -> None:
    assert generate_greedy(pipeline, [], VOCABULARY, MAX_TOKENS, ()) == []
