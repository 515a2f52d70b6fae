"""Answers token by token are those of the whole text computed anew, whoever is asked beside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stitch_server.model.adapters import Adapters
from stitch_training.frozen_models import Pair
from stitch_training.greedy_answers import answers
from stitch_training.least_squares import AffineMap
from stitch_training.scoring import System, alone, left_out, stitched
from tests.support.tiny_fit import drawn_sequences, tiny_pair

# Tokens that both tiny models know.
VOCABULARY = 60
MOST = 12


@pytest.fixture(params=["alone", "stitched", "first token set, adapted", "left out"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> System:
    pair: Pair = tiny_pair(tmp_path)
    draw = torch.Generator().manual_seed(0)
    stitch = AffineMap(torch.randn(32, 48, generator=draw).double(), torch.randn(32, generator=draw).double())
    draw_more = torch.Generator().manual_seed(1)
    set_first = replace(stitch, first=torch.randn(32, generator=draw_more).double())
    adapters = Adapters(1, torch.randn(1, 2, 32, generator=draw_more), torch.randn(1, 32, 2, generator=draw_more))
    systems = {
        "alone": alone(pair.bottom),
        "stitched": stitched(pair, (2, 1), stitch),
        "first token set, adapted": stitched(pair, (2, 1), set_first, adapters),
        "left out": left_out(pair.bottom, (1, 2)),
    }
    return systems[request.param]


def prompts() -> list[list[int]]:
    """Of different lengths."""
    return [list(sequence.token_ids)[: 5 + 9 * index] for index, sequence in enumerate(drawn_sequences(3, 0))]


def computed_anew(system: System, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(system.head.logits(system.states(torch.tensor([ids]))[0, -1:])[:, :VOCABULARY].argmax()))
    return ids[len(prompt) :]


def test_answers_are_those_without_a_cache(system: System) -> None:
    expected = [computed_anew(system, prompt, MOST) for prompt in prompts()]
    assert answers(system, prompts(), VOCABULARY, MOST, ()) == expected
    assert [answers(system, [prompt], VOCABULARY, MOST, ())[0] for prompt in prompts()] == expected


def test_an_end_token_ends_one_answer_and_no_other(system: System) -> None:
    whole = answers(system, prompts(), VOCABULARY, MOST, ())
    end = whole[1][3]
    first_ends = [one.index(end) + 1 if end in one else MOST for one in whole]
    assert answers(system, prompts(), VOCABULARY, MOST, {end}) == [
        one[:n] for one, n in zip(whole, first_ends, strict=True)
    ]


def test_nobody_asked_answers_nothing(system: System) -> None:
    assert answers(system, [], VOCABULARY, MOST, ()) == []
