"""Chains of shards say what the same stitched pair says in one process: families, cuts, chunks, crowds."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.in_process import Shards, open_shards
from tests.support.stitched_reference import StitchedReference, reference
from tests.support.tiny_cluster import BOTTOM, CUTS, TOP, write_tiny_cluster
from tests.support.tiny_model import TOKENS

Ranges = Sequence[tuple[int, int]]

# A window shorter than every prompt here, on all layers or on the later ones alone.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
}
# Bottom shards and top shards.
LAYOUTS: dict[str, tuple[Ranges, Ranges]] = {
    "two shards": ([BOTTOM], [TOP]),
    "bottom in two": ([(0, 2), (2, 4)], [TOP]),
    "weak leaves before the second bottom shard": ([(0, 3), (3, 4)], [TOP]),
    "strong joins behind the first top shard": ([BOTTOM], [(2, 3), (3, 4)]),
    "both in two": ([(0, 1), (1, 4)], [(2, 3), (3, 4)]),
}
PROMPT_TOKENS = 45
ANSWER_TOKENS = 12


def drawn_prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(TOKENS), k=tokens)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """References by family and route, each loaded once."""

    @functools.cache
    def load(family: str, route: str) -> StitchedReference:
        folder = tmp_path_factory.mktemp(family)
        write_tiny_cluster(folder, family, model=FAMILIES[family])
        stitch = folder / ("stitch.safetensors" if route == "weak" else "strong.safetensors")
        return reference(folder / "bottom", folder / "top", stitch, *CUTS[route])

    yield load
    load.cache_clear()


def greedy(model: StitchedReference, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What the reference would say at every position of the answer.

    One pass over prompt and answer; equal to the answer exactly if the reference generates that answer. Rows that
    only pad the top's vocabulary stand for no token.
    """
    logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1, :TOKENS]
    return torch.argmax(logits, dim=1).tolist()


CASES = [("llama", layout) for layout in LAYOUTS] + [
    (family, "both in two") for family in FAMILIES if family != "llama"
]


async def differences(shards: Shards, references: Any, family: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    """All prompts on both routes at once: the routes, with prompt and answer, where the reference says otherwise."""
    asked = [(route, prompt) for prompt in prompts for route in CUTS]
    answers = await asyncio.gather(*(shards.generate(prompt, route, ANSWER_TOKENS) for route, prompt in asked))
    assert [len(answer) for answer in answers] == [ANSWER_TOKENS] * len(asked)
    pairs = zip(asked, answers, strict=True)
    wanted = [
        (route, prompt, answer, greedy(references(family, route), prompt, answer)) for (route, prompt), answer in pairs
    ]
    return [f"{route} {prompt}: {answer}, not {other}" for route, prompt, answer, other in wanted if answer != other]


@pytest.mark.parametrize(("family", "layout"), CASES)
async def test_every_chain_says_what_the_whole_says(family: str, layout: str, tmp_path: Path, references: Any) -> None:
    bottoms, tops = LAYOUTS[layout]
    file = write_tiny_cluster(tmp_path, family, bottoms=bottoms, tops=tops, model=FAMILIES[family], prefill_tokens=16)
    async with open_shards(file) as shards:
        # Alone, then several sessions of both routes at once.
        assert await differences(shards, references, family, [drawn_prompt(1)]) == []
        assert (
            await differences(shards, references, family, [drawn_prompt(seed, 10 * seed) for seed in (2, 3, 4)]) == []
        )
