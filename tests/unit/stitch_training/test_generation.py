"""Greedy and sampled generation with a KV cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stitch_server.model.adapters import Adapters
from stitch_training.generation import Answer, generate_greedy, generate_sampled
from stitch_training.least_squares import AffineMap, CutPoint
from stitch_training.models import Pair
from stitch_training.scoring import Pipeline, stitched, whole
from tests.support.tiny_fit import drawn_sequences, tiny_pair

# Tokens that both tiny models have.
VOCABULARY = 60
MAX_TOKENS = 12


@pytest.fixture(params=["whole", "stitched", "first token set, adapted"])
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


def sampled(pipeline: Pipeline, given: list[list[int]], seeds: list[int], temperature: float = 1.0) -> list[list[int]]:
    answers = generate_sampled(pipeline, given, seeds, VOCABULARY, MAX_TOKENS, (), temperature)
    return [one.token_ids for one in answers if one is not None]


def test_sampled_answers_depend_on_their_seed_and_not_on_the_batch(pipeline: Pipeline) -> None:
    together = sampled(pipeline, prompts(), [5, 6, 7])
    alone = [sampled(pipeline, [prompt], [seed])[0] for prompt, seed in zip(prompts(), (5, 6, 7), strict=True)]
    assert together == alone
    assert all(one != other for one, other in zip(together, sampled(pipeline, prompts(), [8, 9, 10]), strict=True))


def test_sampling_without_a_temperature_is_greedy(pipeline: Pipeline) -> None:
    assert sampled(pipeline, prompts(), [1, 2, 3], 0.0) == generate_greedy(
        pipeline, prompts(), VOCABULARY, MAX_TOKENS, ()
    )


def test_sampling_says_whether_an_answer_was_cut_and_drops_those_without_an_end(pipeline: Pipeline) -> None:
    greedy = generate_greedy(pipeline, prompts(), VOCABULARY, MAX_TOKENS, ())
    end = greedy[0][3]
    first_end = greedy[0].index(end)
    calls = iter(range(1000))

    def is_over() -> bool:
        # Three prefills, and decode steps until the first answer has ended.
        return next(calls) >= 3 + first_end

    found = generate_sampled(pipeline, prompts(), [0] * 3, VOCABULARY, MAX_TOKENS, {end}, 0.0, is_over)
    assert found[0] == Answer(greedy[0][: first_end + 1], is_cut=False)
    assert [one is None for one in found[1:]] == [end not in one[: first_end + 1] for one in greedy[1:]]
    whole_answers = generate_sampled(pipeline, prompts(), [0] * 3, VOCABULARY, MAX_TOKENS, (), 0.0)
    assert whole_answers == [Answer(one, is_cut=True) for one in greedy]
