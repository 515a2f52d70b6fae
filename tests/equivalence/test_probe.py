"""A session whose route the probe decides generates the same tokens as one that names this route."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from stitch.cluster import load_cluster
from stitch.grammar import Grammar
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.in_process import ChainInProcess
from tests.support.loopback_shards import Shards, open_shards
from tests.support.tiny_cluster import BOTTOM, TOP, WHOLE_BOTTOM, write_tiny_cluster
from tests.support.tiny_probe import WINDOW, random_prompt, with_tiny_probe
from tests.support.waiting import eventually

ANSWER_TOKENS = 10
PROMPTS = [
    random_prompt(seed, length) for seed, length in enumerate((1, 5, WINDOW, WINDOW + 1, 45, 46, 60, 33, 21, 50))
]

LAYOUTS = {
    "two shards": ([BOTTOM], [TOP]),
    "the first shard ends at the earliest cut": ([(0, 3), (3, 4)], [TOP]),
    "two top shards": ([BOTTOM], [(2, 3), (3, 4)]),
}


def with_probe(folder: Path, layout: str = "two shards", **compute: Any) -> Path:
    bottoms, tops = LAYOUTS[layout]
    return with_tiny_probe(write_tiny_cluster(folder, bottoms=bottoms, tops=tops, **compute))


async def routes_of(shards: Shards, prompts: list[list[int]]) -> list[str]:
    """Generates for all prompts at once, compares each with its named route, and returns the routes."""
    answers = await asyncio.gather(*(shards.generate_with_probe(prompt, ANSWER_TOKENS) for prompt in prompts))
    routes = [decision.route for decision, _ in answers]
    assert [decision.failure for decision, _ in answers] == [""] * len(prompts)
    named = [await shards.generate(prompt, route, ANSWER_TOKENS) for prompt, route in zip(prompts, routes, strict=True)]
    assert [tokens for _, tokens in answers] == named
    return routes


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_probe_routed_session_equals_the_named_route(layout: str, tmp_path: Path) -> None:
    async with open_shards(with_probe(tmp_path, layout, max_prefill_chunk=16)) as shards:
        routes = await routes_of(shards, PROMPTS)
        assert set(routes) == {"weak", "strong"}
        await eventually(lambda: set(shards.kv_usage().values()) == {0.0})


def with_whole_bottom(folder: Path) -> Path:
    """A probe that decides between `weak` and a `strong` which is the bottom alone."""
    file = write_tiny_cluster(folder, bottoms=[WHOLE_BOTTOM], tops=[TOP], max_prefill_chunk=16)
    fields = json.loads(file.read_text())
    fields["routes"][1] = {"name": "strong", "bottom_layers": WHOLE_BOTTOM[1]}
    file.write_text(json.dumps(fields))
    return with_tiny_probe(file)


async def test_probe_routed_session_may_end_on_the_first_shard(tmp_path: Path) -> None:
    async with open_shards(with_whole_bottom(tmp_path)) as shards:
        assert set(await routes_of(shards, PROMPTS)) == {"weak", "strong"}
        await eventually(lambda: set(shards.kv_usage().values()) == {0.0})


def test_session_with_a_grammar_follows_it_whichever_shard_its_route_ends_on(tmp_path: Path) -> None:
    chain, candidates = (
        ChainInProcess(load_cluster(str(with_whole_bottom(tmp_path)))),
        {"weak": ("top-0",), "strong": ()},
    )
    fields: dict[str, Any] = {"candidates": candidates, "grammar": Grammar("regex", "[a-z]{6}"), "stop_token_ids": (2,)}
    routes = set()
    for ids in PROMPTS:
        outputs = chain.admit(ids, "", ("bottom-0",), 20, **fields)
        chain.run(outputs)
        token_ids = [output.token.id for output in outputs if output.token is not None]
        assert re.fullmatch("[a-z]{6}", byte_tokenizer().decode(token_ids[:-1]))
        routes |= {output.decision.route for output in outputs if output.decision is not None}
    assert routes == {"weak", "strong"}


async def test_probe_route_is_independent_of_chunks_and_batching(tmp_path: Path) -> None:
    found = []
    for name, compute in {"small": {"max_prefill_chunk": 5}, "large": {"max_prefill_chunk": 256}}.items():
        (tmp_path / name).mkdir()
        async with open_shards(with_probe(tmp_path / name, **compute)) as shards:
            together = await routes_of(shards, PROMPTS)
            alone = [(await shards.generate_with_probe(prompt, 1))[0].route for prompt in PROMPTS]
            found += [together, alone]
    assert found[1:] == found[:1] * 3


async def test_probe_decision_reports_gains_and_score(tmp_path: Path) -> None:
    async with open_shards(with_probe(tmp_path)) as shards:
        decision, _ = await shards.generate_with_probe(PROMPTS[4], 1)
        (free, gain), (threshold,) = decision.gains, decision.thresholds
        assert free == 0.0
        assert (decision.route == "strong") == (gain > threshold)
        assert 0 <= decision.score <= 1


async def test_probe_gain_is_independent_of_tokens_after_the_window(tmp_path: Path) -> None:
    async with open_shards(with_probe(tmp_path)) as shards:
        first, _ = await shards.generate_with_probe(random_prompt(1, WINDOW) + random_prompt(2, 30), 1)
        second, _ = await shards.generate_with_probe(random_prompt(1, WINDOW) + random_prompt(3, 20), 1)
        assert list(second.gains) == pytest.approx(list(first.gains), rel=1e-4)
        third, _ = await shards.generate_with_probe(random_prompt(4, WINDOW) + random_prompt(2, 30), 1)
        assert list(third.gains) != pytest.approx(list(first.gains), rel=1e-2)


async def test_preempted_session_keeps_its_route(tmp_path: Path) -> None:
    # Three prompts fit at once, but not with their answers, which are longer than the first shard expects.
    async with open_shards(with_probe(tmp_path, kv_tokens=10 * BLOCK_TOKENS)) as shards:
        await shards.answer_briefly("weak")
        pool = shards.running["bottom-0"].shard.pool
        await asyncio.gather(*(shards.generate_with_probe(random_prompt(seed, 45), ANSWER_TOKENS) for seed in range(4)))
        assert pool.queried_tokens > 0, "no session was preempted: undecided ones query no prefix"
        await routes_of(shards, [random_prompt(seed, 45) for seed in range(10, 14)])
        await eventually(lambda: set(shards.kv_usage().values()) == {0.0})


async def test_prefix_of_probe_routed_session_is_reused_by_its_route(tmp_path: Path) -> None:
    async with open_shards(with_probe(tmp_path)) as shards:
        prompt = random_prompt(5, 45)
        decision, tokens = await shards.generate_with_probe(prompt, ANSWER_TOKENS)
        assert await shards.generate(prompt, decision.route, ANSWER_TOKENS) == tokens
        for name in ("bottom-0", "top-0"):
            assert shards.running[name].shard.pool.reused_tokens == 2 * BLOCK_TOKENS


async def test_sampled_answer_of_probe_route_equals_the_named_route(tmp_path: Path) -> None:
    async with open_shards(with_probe(tmp_path)) as shards:
        chosen: dict[str, Any] = {"temperature": 0.9, "repetition_penalty": 1.1, "seed": 3}
        decision, tokens = await shards.generate_with_probe(PROMPTS[5], ANSWER_TOKENS, **chosen)
        assert await shards.generate(PROMPTS[5], decision.route, ANSWER_TOKENS, **chosen) == tokens


async def test_shard_without_probe_decides_for_the_fallback_route(tmp_path: Path) -> None:
    async with open_shards(write_tiny_cluster(tmp_path)) as shards:
        decision, tokens = await shards.generate_with_probe(PROMPTS[4], ANSWER_TOKENS)
        assert (decision.route, decision.failure) == ("strong", "the first shard has no probe")
        assert tokens == await shards.generate(PROMPTS[4], "strong", ANSWER_TOKENS)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda request: request.candidates.pop(), "candidates.route"),
        (lambda request: request.candidates[0].ClearField("chain"), "candidates.chain"),
        (lambda request: setattr(request, "route", "weak"), "candidates"),
        (lambda request: setattr(request.candidates[0], "route", "strong"), "candidates.route"),
    ],
)
async def test_invalid_candidates_are_refused_with_their_field(tmp_path: Path, change: Any, field: str) -> None:
    async with open_shards(with_probe(tmp_path)) as shards:
        stub = shards.stubs["bottom-0"]

        class Changed:
            def Generate(self, request: Any) -> Any:
                change(request)
                return stub.Generate(request)

        shards.stubs["bottom-0"] = Changed()  # type: ignore[assignment]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await shards.generate_with_probe(PROMPTS[4], 1)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (raised.value.details() or "").startswith(f"{field} ")
