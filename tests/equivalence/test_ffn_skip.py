"""Answers with FFNs left out are those of the reference: alone, batched, preempted, replayed, with a reused prefix."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.loopback_shards import Shards, open_shards
from tests.support.stitched_reference import WholeReference
from tests.support.tiny_cluster import WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.tiny_gates import ROUTE, SkippingReference, add_skipping_route
from tests.support.tiny_model import NATIVE_FAMILIES, TOKENS

ANSWER_TOKENS = 24
OTHERS = ("small", "weak", "strong", "whole")
LAYOUTS = {"one shard": [WHOLE_BOTTOM], "three shards": [(0, 1), (1, 3), (3, 5)]}


def drawn_prompt(seed: int, tokens: int = 45) -> list[int]:
    return random.Random(seed).choices(range(TOKENS), k=tokens)


def write_cluster(folder: Path, family: str = "llama", layout: str = "one shard", **compute: object) -> Path:
    file = write_tiny_cluster(
        folder, family, bottoms=LAYOUTS[layout], tops=[WHOLE_TOP], with_ends=True, max_prefill_chunk=16, **compute
    )
    return add_skipping_route(file)


def reference(folder: Path) -> SkippingReference:
    return SkippingReference(folder / "bottom", folder / "gates.safetensors")


async def answers_of(shards: Shards, prompts: Sequence[Sequence[int]], route: str = ROUTE) -> list[list[int]]:
    return await asyncio.gather(*(shards.generate(prompt, route, ANSWER_TOKENS) for prompt in prompts))


@pytest.mark.parametrize(
    ("family", "layout", "kernels"),
    [(family, "one shard", True) for family in NATIVE_FAMILIES]
    + [("llama", "three shards", True), ("llama", "one shard", False)],
)
async def test_answers_equal_the_reference_alone_and_beside_all_routes(
    family: str, layout: str, kernels: bool, tmp_path: Path
) -> None:
    prompts = [drawn_prompt(seed, 10 * seed) for seed in (1, 3, 4)]
    async with open_shards(write_cluster(tmp_path, family, layout, kernels=kernels)) as shards:
        alone = [(await answers_of(shards, [prompt]))[0] for prompt in prompts]
        others = [shards.generate(prompt, route, ANSWER_TOKENS) for prompt in prompts for route in OTHERS]
        together, others_together = await asyncio.gather(answers_of(shards, prompts), asyncio.gather(*others))
        others_alone = [await shards.generate(prompt, route, ANSWER_TOKENS) for prompt in prompts for route in OTHERS]
    expected = reference(tmp_path)
    for prompt, answer in zip(prompts, alone, strict=True):
        assert answer == expected.greedy(prompt, answer)
        # Some of the FFNs that have a gate are skipped, and some are not.
        assert 0 < sum(expected.skipped.values()) < 3 * ANSWER_TOKENS
    assert together == alone
    assert others_together == others_alone
    assert others_alone[3::4] != alone


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("generated", [1, 7, BLOCK_TOKENS + 3])
async def test_replay_recomputes_generated_tokens_with_their_gates(generated: int, layout: str, tmp_path: Path) -> None:
    prompt = drawn_prompt(5)
    async with open_shards(write_cluster(tmp_path, layout=layout)) as shards:
        answer = await shards.generate(prompt, ROUTE, ANSWER_TOKENS)
        # What other routes keep of the same tokens, prompt and answer, is not that of tokens that skip.
        await shards.generate([*prompt, *answer], "whole", 1)
        assert await shards.replay(prompt, answer[:generated], ROUTE, ANSWER_TOKENS) == answer[generated:]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_next_turn_does_not_reuse_the_answer_that_skipped(layout: str, tmp_path: Path) -> None:
    prompt = drawn_prompt(6, 2 * BLOCK_TOKENS + 1)
    async with open_shards(write_cluster(tmp_path, layout=layout)) as shards:
        pool = shards.running["bottom-0"].shard.pool
        answer = await shards.generate(prompt, ROUTE, ANSWER_TOKENS)
        turn = [*prompt, *answer, *drawn_prompt(7, 8)]
        following = await shards.generate(turn, ROUTE, ANSWER_TOKENS)
        # The prompt's blocks and none of the answer's.
        assert pool.reused_tokens == 2 * BLOCK_TOKENS
        elsewhere = await shards.generate(turn, "whole", ANSWER_TOKENS)
    whole = WholeReference(tmp_path / "bottom").logits([*turn, *elsewhere])[len(turn) - 1 : -1, :TOKENS]
    assert elsewhere == whole.argmax(1).tolist()
    assert following == reference(tmp_path).greedy(turn, following)


async def test_preempted_sessions_equal_the_reference(tmp_path: Path) -> None:
    prompts = [drawn_prompt(seed) for seed in (8, 9, 10)]
    async with open_shards(write_cluster(tmp_path, kv_tokens=10 * BLOCK_TOKENS)) as shards:
        await shards.answer_briefly(ROUTE)
        pool = shards.running["bottom-0"].shard.pool
        before = pool.queried_tokens
        answers = await answers_of(shards, prompts)
        assert pool.queried_tokens - before > len(prompts) * 2 * BLOCK_TOKENS, "no session was preempted"
    expected = reference(tmp_path)
    assert answers == [expected.greedy(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
