"""Chains of shards equal the stitched reference over model families, layer ranges, chunks, batches and preemption."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.link_peer import open_link_peer, opening_step
from tests.support.loopback_shards import Shards, open_shards
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
    # Computed by the layers of `transformers`.
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
}
# Bottom shards and top shards.
LAYOUTS: dict[str, tuple[Ranges, Ranges]] = {
    "two shards": ([BOTTOM], [TOP]),
    "two bottom shards": ([(0, 2), (2, 4)], [TOP]),
    "weak leaves before the second bottom shard": ([(0, 3), (3, 4)], [TOP]),
    "strong joins after the first top shard": ([BOTTOM], [(2, 3), (3, 4)]),
    "two bottom and two top shards": ([(0, 1), (1, 4)], [(2, 3), (3, 4)]),
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
    """The reference's greedy token at every position of the answer.

    One pass over prompt and answer; equal to the answer exactly if the reference generates that answer. Rows that
    pad the top's vocabulary are excluded.
    """
    logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1, :TOKENS]
    return torch.argmax(logits, dim=1).tolist()


CASES = [("llama", layout) for layout in LAYOUTS] + [
    (family, "two bottom and two top shards") for family in FAMILIES if family != "llama"
]


async def differences(shards: Shards, references: Any, family: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Generates for all prompts on both routes at once; returns a line for each answer unlike the reference."""
    requests = [(route, prompt) for prompt in prompts for route in CUTS]
    answers = await asyncio.gather(*(shards.generate(prompt, route, ANSWER_TOKENS) for route, prompt in requests))
    assert [len(answer) for answer in answers] == [ANSWER_TOKENS] * len(requests)
    pairs = zip(requests, answers, strict=True)
    wanted = [
        (route, prompt, answer, greedy(references(family, route), prompt, answer)) for (route, prompt), answer in pairs
    ]
    return [f"{route} {prompt}: {answer}, not {other}" for route, prompt, answer, other in wanted if answer != other]


@pytest.mark.parametrize(("family", "layout"), CASES)
async def test_chain_equals_the_reference(family: str, layout: str, tmp_path: Path, references: Any) -> None:
    bottoms, tops = LAYOUTS[layout]
    file = write_tiny_cluster(
        tmp_path, family, bottoms=bottoms, tops=tops, model=FAMILIES[family], max_prefill_chunk=16
    )
    async with open_shards(file) as shards:
        # One prompt, then several prompts on both routes at once.
        assert await differences(shards, references, family, [drawn_prompt(1)]) == []
        assert (
            await differences(shards, references, family, [drawn_prompt(seed, 10 * seed) for seed in (2, 3, 4)]) == []
        )


@pytest.mark.parametrize("max_prefill_chunk", [1, 7, 64])
async def test_answer_is_independent_of_the_prefill_chunk_size(
    max_prefill_chunk: int, tmp_path: Path, references: Any
) -> None:
    file = write_tiny_cluster(tmp_path, "llama", max_prefill_chunk=max_prefill_chunk)
    async with open_shards(file) as shards:
        assert await differences(shards, references, "llama", [drawn_prompt(5)]) == []


async def test_seeded_answer_is_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    async with open_shards(write_tiny_cluster(tmp_path, bottoms=[(0, 2), (2, 4)], max_prefill_chunk=16)) as shards:

        async def generate(seed: int) -> list[int]:
            route = ("weak", "strong")[seed % 2]
            chosen: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": seed}
            return await shards.generate(drawn_prompt(seed), route, ANSWER_TOKENS, **chosen)

        alone = [await generate(seed) for seed in range(6)]
        assert await asyncio.gather(*map(generate, range(6))) == alone
        assert len({tuple(answer) for answer in alone}) == 6
        # Sampled, not greedy.
        assert await shards.generate(drawn_prompt(0), "weak", ANSWER_TOKENS) != alone[0]


async def test_answer_with_reused_prefix_equals_the_reference(tmp_path: Path, references: Any) -> None:
    bottoms, tops = LAYOUTS["two bottom and two top shards"]
    prompt = drawn_prompt(6)
    others = [prompt[:40] + drawn_prompt(7, 9), prompt[:16] + drawn_prompt(8, 30)]
    async with open_shards(write_tiny_cluster(tmp_path, bottoms=bottoms, tops=tops)) as shards:
        pools = {name: shards.running[name].shard.pool for name in shards.running}
        assert await differences(shards, references, "llama", [prompt]) == []
        assert {pool.reused_tokens for pool in pools.values()} == {0}
        assert await differences(shards, references, "llama", [prompt, *others]) == []
        # Two full blocks of the same prompt, two of the one that shares 40 tokens, one of the one that shares 16.
        for name, pool in pools.items():
            routes = [route for route in CUTS if name in shards.chain(route)]
            assert pool.reused_tokens == (2 + 2 + 1) * BLOCK_TOKENS * len(routes)


async def test_preempted_sessions_equal_the_reference(tmp_path: Path, references: Any) -> None:
    # Three prompts fit at once, but not with their answers, which are longer than the first shard expects.
    async with open_shards(write_tiny_cluster(tmp_path, kv_tokens=10 * BLOCK_TOKENS)) as shards:
        await shards.answer_briefly("weak")
        assert await differences(shards, references, "llama", [drawn_prompt(9), drawn_prompt(10)]) == []
        queried = shards.running["bottom-0"].shard.pool.queried_tokens
        assert queried > 4 * 2 * BLOCK_TOKENS, "no session was preempted"
        assert set(shards.kv_usage().values()) == {0.0}


async def test_session_refused_by_a_full_next_shard_equals_the_reference(tmp_path: Path, references: Any) -> None:
    file = write_tiny_cluster(tmp_path, kv_tokens=10 * BLOCK_TOKENS)
    prompts = [drawn_prompt(seed, BLOCK_TOKENS + 1) for seed in (11, 12)]
    async with open_shards(file) as shards:
        bottom, top = shards.address("bottom-0"), shards.address("top-0")
        async with open_link_peer(top, like=bottom) as other:
            # Another upstream shard leaves two free blocks, enough for one of the two sessions.
            await other.shake_hands()
            step = opening_step(1, "weak", 8 * BLOCK_TOKENS, other.identity.bottom.hidden_size)
            assert len((await other.run_step(step)).tokens) == 1
            answers = await asyncio.gather(*(shards.generate(prompt, "weak", ANSWER_TOKENS) for prompt in prompts))
        queried = shards.running["bottom-0"].shard.pool.queried_tokens
        assert queried > len(prompts) * BLOCK_TOKENS, "no session was preempted"
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedy(references("llama", "weak"), prompt, answer)
