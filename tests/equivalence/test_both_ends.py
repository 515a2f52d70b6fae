"""Both models alone, as routes beside the stitched ones, give the tokens of `generate` of each model."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stitch.cluster import Quantization, load_cluster
from stitch.grammar import Grammar
from stitch.v1.inference_pb2 import FINISH_REASON_STOP
from stitch_server import build
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.model.description import ParameterCount
from stitch_server.model.weights import WeightFormat
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.cpu_capture import CpuCapture
from tests.support.in_process import ChainInProcess
from tests.support.loopback_shards import Shards, open_shards
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.stitched_reference import reference
from tests.support.tiny_cluster import CUTS, ENDS, WHOLE_BOTTOM, WHOLE_TOP, write_tiny_cluster
from tests.support.tiny_model import TOKENS
from tests.support.waiting import eventually
from tests.support.whole_model import PROMPT, generated, our_logits

ANSWER_TOKENS = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    # Computed by the layers of `transformers`.
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3},
}
# Bottom shards and top shards: routes end and go on on one shard, and begin and continue on one.
LAYOUTS: dict[str, dict[str, Any]] = {
    "two shards": {"bottoms": [WHOLE_BOTTOM], "tops": [WHOLE_TOP]},
    "four shards": {"bottoms": [(0, 2), (2, 5)], "tops": [(0, 3), (3, 4)]},
}
CHAINS = {"small": ("top-0",), "whole": ("bottom-0",), **dict.fromkeys(CUTS, ("bottom-0", "top-0"))}
# The end token of the tiny models.
END = 2
# The tokens after a prompt.
Greedy = Callable[[str, Sequence[int], int], list[int]]


def prompt(seed: int, tokens: int = 40) -> list[int]:
    return [3 + (seed * 101 + 37 * index * index) % (TOKENS - 3) for index in range(tokens)]


def in_process(folder: Path) -> ChainInProcess:
    """Two shards with all routes."""
    return ChainInProcess(load_cluster(str(write_tiny_cluster(folder, **LAYOUTS["two shards"], with_ends=True))))


@pytest.fixture(scope="module")
def greedy_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Greedy]]:
    """By family, a function of route, prompt and number of tokens, by `transformers` alone."""

    @functools.cache
    def load(family: str) -> Greedy:
        folder = tmp_path_factory.mktemp(family)
        write_tiny_cluster(folder, family, model=FAMILIES[family])
        models: dict[str, PreTrainedModel] = {
            "small": AutoModelForCausalLM.from_pretrained(folder / "top", dtype=torch.float32),
            "whole": AutoModelForCausalLM.from_pretrained(folder / "bottom", dtype=torch.float32),
        }
        files = {"weak": folder / "stitch.safetensors", "strong": folder / "strong.safetensors"}
        stitched = {route: reference(folder / "bottom", folder / "top", files[route], *CUTS[route]) for route in CUTS}

        def greedy(route: str, token_ids: Sequence[int], count: int) -> list[int]:
            if route in stitched:
                return stitched[route].generate(token_ids, count)
            return generated(models[route], token_ids, count, tokens=TOKENS)

        return greedy

    yield load
    load.cache_clear()


async def check(shards: Shards, greedy: Greedy, prompts: Sequence[Sequence[int]]) -> None:
    """Generates for all prompts on all routes at once, and compares with the references."""
    requests = [(route, one) for one in prompts for route in ENDS]
    answers = await asyncio.gather(*(shards.generate(one, route, ANSWER_TOKENS) for route, one in requests))
    for (route, one), answer in zip(requests, answers, strict=True):
        assert answer == greedy(route, one, ANSWER_TOKENS), f"{route}, {len(one)} tokens"


@pytest.mark.parametrize(
    ("family", "layout"), [*(("llama", one) for one in LAYOUTS), ("qwen2", "four shards"), ("granite", "two shards")]
)
async def test_every_route_equals_its_model_alone_and_at_once(
    family: str, layout: str, tmp_path: Path, greedy_of: Callable[[str], Greedy]
) -> None:
    file = write_tiny_cluster(
        tmp_path, family, **LAYOUTS[layout], model=FAMILIES[family], with_ends=True, max_prefill_chunk=16
    )
    greedy = greedy_of(family)
    async with open_shards(file) as shards:
        for route in "small", "whole":
            assert await shards.generate(prompt(1), route, ANSWER_TOKENS) == greedy(route, prompt(1), ANSWER_TOKENS)
        await check(shards, greedy, [prompt(seed, 11 * seed) for seed in (2, 3, 4)])
        await eventually(lambda: set(shards.kv_usage().values()) == {0.0})


def test_one_pass_holds_sessions_of_every_route(tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    chain = in_process(tmp_path)
    requests = {route: chain.admit(prompt(5), route, CHAINS[route], ANSWER_TOKENS) for route in ENDS}
    chain.run(*requests.values())
    for route, outputs in requests.items():
        token_ids = [output.token.id for output in outputs if output.token is not None]
        assert token_ids == greedy_of("llama")(route, prompt(5), ANSWER_TOKENS)
    assert {"weak", "strong", "whole"} in chain.passes["bottom-0"]
    assert {"weak", "strong", "small"} in chain.passes["top-0"]
    assert chain.idle


@pytest.mark.parametrize("route", ["small", "whole"])
def test_answer_matches_its_grammar_alone_and_over_replay(route: str, tmp_path: Path) -> None:
    chain, rules = in_process(tmp_path), Grammar("regex", "[a-z]{8}[0-9]{4}")
    sampling: dict[str, Any] = {"grammar": rules, "stop_token_ids": (END,), "temperature": 1.0, "seed": 3}
    outputs = chain.admit(prompt(15, 20), route, CHAINS[route], 40, **sampling)
    chain.run(outputs)
    answer = [output.token.id for output in outputs if output.token is not None]
    assert re.fullmatch("[a-z]{8}[0-9]{4}", byte_tokenizer().decode(answer[:-1]))
    assert (answer[-1], outputs[-1].finish_reason) == (END, FINISH_REASON_STOP)
    again = chain.admit([*prompt(15, 20), *answer[:5]], route, CHAINS[route], 40, prompt_tokens=20, **sampling)
    chain.run(again)
    assert [output.token.id for output in again if output.token is not None] == answer[5:]


def test_draining_shard_finishes_its_own_requests(tmp_path: Path) -> None:
    chain = in_process(tmp_path)
    outputs = chain.admit(prompt(16), "small", ("top-0",), ANSWER_TOKENS)
    chain.shards["top-0"].start_draining()
    chain.run(outputs)
    assert len(outputs) == ANSWER_TOKENS


def test_parameters_are_those_of_each_model_with_its_head(tmp_path: Path) -> None:
    chain = in_process(tmp_path)
    for route, role in (("small", "top"), ("whole", "bottom")):
        count = ParameterCount.read(tmp_path / role)
        stated = [one for shard in chain.shards.values() for one in shard.identity.routes if one.name == route]
        assert [one.parameters for one in stated] == [count.between(0, None) + count.head]
        assert stated[0].HasField("top_from") == (route == "small")


def test_time_to_first_token_is_that_of_the_own_stages(tmp_path: Path) -> None:
    chain = in_process(tmp_path)
    stages = {}
    for route in "small", "whole":
        outputs = chain.admit(prompt(17), route, CHAINS[route], 2)
        chain.run(outputs)
        stages[route] = outputs[0].stages
    assert set(stages["whole"]) == {"queue", "bottom_prefill", "sample"}
    assert set(stages["small"]) == {"queue", "top_prefill", "stitch", "sample", "wire"}
    assert all(min(one.values()) >= 0 for one in stages.values())


async def test_request_to_a_shard_on_which_its_route_does_not_begin_is_refused(tmp_path: Path) -> None:
    async with open_shards(write_tiny_cluster(tmp_path, **LAYOUTS["two shards"], with_ends=True)) as shards:
        for route, chain, reason in (
            ("weak", ["top-0"], "it begins on bottom-0, not on top-0"),
            ("small", ["bottom-0"], "it begins on top-0, not on bottom-0"),
            ("whole", ["bottom-0", "top-0"], "after bottom-0 route whole passes no shard"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=reason):
                await shards.generate(prompt(18), route, 1, chain)
        with pytest.raises(grpc.aio.AioRpcError, match=f"the head has {TOKENS} logits"):
            # A row that pads the top's vocabulary.
            await shards.generate(prompt(18), "small", 1, forced_token_ids=(TOKENS,))


async def test_answer_with_reused_prefix_equals_the_models(tmp_path: Path, greedy_of: Callable[[str], Greedy]) -> None:
    async with open_shards(write_tiny_cluster(tmp_path, **LAYOUTS["four shards"], with_ends=True)) as shards:
        pools = {name: running.shard.pool for name, running in shards.running.items()}
        await check(shards, greedy_of("llama"), [prompt(6)])
        assert {pool.reused_tokens for pool in pools.values()} == {0}
        await check(shards, greedy_of("llama"), [[*prompt(6), *prompt(7, 9)]])
        for name, pool in pools.items():
            routes = [route for route in ENDS if name in shards.chain(route)]
            assert pool.reused_tokens == 2 * BLOCK_TOKENS * len(routes)


@pytest.mark.parametrize("route", ["small", "whole"])
async def test_preempted_sessions_equal_the_models(
    route: str, tmp_path: Path, greedy_of: Callable[[str], Greedy]
) -> None:
    # Three prompts fit at once, but not with their answers, which are longer than the first shard expects.
    file = write_tiny_cluster(tmp_path, **LAYOUTS["two shards"], with_ends=True, kv_tokens=10 * BLOCK_TOKENS)
    prompts = [prompt(seed, 45) for seed in (20, 21, 22, 23)]
    async with open_shards(file) as shards:
        await shards.answer_briefly(route)
        answers = await asyncio.gather(*(shards.generate(one, route, ANSWER_TOKENS) for one in prompts))
        assert answers == [greedy_of("llama")(route, one, ANSWER_TOKENS) for one in prompts]
        (shard,) = shards.chain(route)
        queried = shards.running[shard].shard.pool.queried_tokens
        assert queried > len(prompts) * 2 * BLOCK_TOKENS, "no session was preempted"
        await eventually(lambda: set(shards.kv_usage().values()) == {0.0})


async def test_both_ends_equal_the_models_as_on_a_gpu(
    tmp_path: Path, greedy_of: Callable[[str], Greedy], monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[CpuCapture] = []

    def capture_for(device: object) -> CpuCapture:
        captures.append(CpuCapture())
        return captures[-1]

    monkeypatch.setattr(build, "varlen_kernel_for", lambda device, dtype, head_dim: reference_varlen)
    monkeypatch.setattr(build, "capture_for", capture_for)
    async with open_shards(write_tiny_cluster(tmp_path, **LAYOUTS["two shards"], with_ends=True, kernels=False)) as on:
        await check(on, greedy_of("llama"), [prompt(10), prompt(11, 7)])
    assert all(capture.replayed > capture.captured > 0 for capture in captures)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
async def test_quantized_ends_choose_as_their_layers_do_in_one_process(
    quantization: Quantization, tmp_path: Path
) -> None:
    file = write_tiny_cluster(tmp_path, **LAYOUTS["two shards"], with_ends=True, quantization=quantization)
    async with open_shards(file) as shards:
        answers = await asyncio.gather(*(shards.generate(PROMPT, route, 1) for route in ENDS))
    chosen, weight_format = dict(zip(ENDS, answers, strict=True)), WeightFormat(quantization, kernels=True)
    for route, folder, layers in ("small", "top", WHOLE_TOP), ("whole", "bottom", WHOLE_BOTTOM):
        logits = our_logits(tmp_path / folder, layers, (0, len(PROMPT)), weight_format=weight_format)[-1, :TOKENS]
        # Activations are rounded, so that what is nearly the best may be chosen.
        assert logits[chosen[route][0]] >= logits.max() - 0.05 * logits.std()


async def test_seeded_answer_continues_from_its_own_tokens(tmp_path: Path) -> None:
    """A replay prefills what was generated, and goes on with the same tokens."""
    sampling: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
    async with open_shards(write_tiny_cluster(tmp_path, **LAYOUTS["four shards"], with_ends=True)) as shards:
        for route in "small", "whole":
            answer = await shards.generate(prompt(14), route, ANSWER_TOKENS, **sampling)
            assert await shards.replay(prompt(14), answer[:5], route, ANSWER_TOKENS, **sampling) == answer[5:]
