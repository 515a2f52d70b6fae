"""Chains that compute on a CPU as on a GPU give the tokens of the whole stitched model.

They use large blocks, one attention kernel for a whole batch, and captured passes. The kernel and the graphs of the
GPU are replaced by references in Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from stitch.cluster import load_cluster
from stitch_server import build
from stitch_server.attention.flash import PAGE_TOKENS
from tests.support.cpu_capture import CpuCapture
from tests.support.in_process import ChainInProcess
from tests.support.loopback_shards import Shards, open_shards
from tests.support.reference_varlen_kernel import reference_varlen
from tests.support.stitched_reference import StitchedReference, reference
from tests.support.tiny_cluster import CUTS, write_tiny_cluster
from tests.support.tiny_model import TOKENS

ANSWER_TOKENS = 10
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": WINDOW}


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[CpuCapture]:
    """The captures of the shards that are built after this; also installs the reference kernel."""
    made: list[CpuCapture] = []

    def capture_for(device: object) -> CpuCapture:
        made.append(CpuCapture())
        return made[-1]

    monkeypatch.setattr(build, "varlen_kernel_for", lambda device, dtype, head_dim: reference_varlen)
    monkeypatch.setattr(build, "capture_for", capture_for)
    return made


def write(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """Writes a tiny cluster without CPU kernels."""
    return write_tiny_cluster(folder, family, model=FAMILIES[family], kernels=False, **fields)


def reference_for(folder: Path, route: str) -> StitchedReference:
    stitch = folder / ("stitch.safetensors" if route == "weak" else "strong.safetensors")
    return reference(folder / "bottom", folder / "top", stitch, *CUTS[route])


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 101 + 37 * index * index) % (TOKENS - 3) for index in range(tokens)]


async def check(shards: Shards, reference_of: Callable[[str], StitchedReference], prompts: list[list[int]]) -> None:
    """Generates for every prompt on both routes at once, and compares with the references."""
    requests = [(route, one) for one in prompts for route in CUTS]
    answers = await asyncio.gather(*(shards.generate(one, route, ANSWER_TOKENS) for route, one in requests))
    for (route, one), answer in zip(requests, answers, strict=True):
        logits = reference_of(route).logits([*one, *answer])[len(one) - 1 : -1, :TOKENS]
        assert answer == logits.argmax(1).tolist(), f"{route}, {len(one)} tokens"


@pytest.mark.parametrize("family", FAMILIES)
async def test_gpu_style_chain_equals_the_reference(family: str, tmp_path: Path, captures: list[CpuCapture]) -> None:
    file = write(tmp_path, family, bottoms=[(0, 1), (1, 4)], tops=[(2, 3), (3, 4)], max_prefill_chunk=100)
    references = {route: reference_for(tmp_path, route) for route in CUTS}
    async with open_shards(file) as shards:
        await check(shards, references.__getitem__, [prompt(20)])
        # One of these answers crosses a block boundary.
        await check(shards, references.__getitem__, [prompt(PAGE_TOKENS - 4, 1), prompt(300, 2), prompt(7, 3)])
        assert {shard.shard.pool.block_tokens for shard in shards.running.values()} == {PAGE_TOKENS}
    assert all(capture.replayed > 3 * capture.captured > 0 for capture in captures)
    assert len(captures) == 4


async def test_full_blocks_of_a_common_prefix_are_reused(tmp_path: Path) -> None:
    file, prefix = write(tmp_path), prompt(2 * PAGE_TOKENS + 20)
    references = {route: reference_for(tmp_path, route) for route in CUTS}
    async with open_shards(file) as shards:
        await check(shards, references.__getitem__, [prefix])
        await check(shards, references.__getitem__, [[*prefix, *prompt(9, 4)]])
        for running in shards.running.values():
            assert running.shard.pool.reused_tokens == 2 * PAGE_TOKENS * len(CUTS)


async def test_preempted_sessions_equal_the_reference(tmp_path: Path) -> None:
    """Both prompts fit into the KV cache and are computed in one pass; their answers, longer than expected, don't."""
    file = write(
        tmp_path,
        kv_tokens=4 * PAGE_TOKENS,
        max_prefill_chunk=512,
        prefill_budget_while_decoding=512,
        max_num_batched_tokens=1024,
    )
    references = {route: reference_for(tmp_path, route) for route in CUTS}
    async with open_shards(file) as shards:
        await shards.answer_briefly("weak")
        await check(shards, references.__getitem__, [prompt(2 * PAGE_TOKENS - 5)])
        queried = shards.running["bottom-0"].shard.pool.queried_tokens
        assert queried > len(CUTS) * PAGE_TOKENS, "no session was preempted"


class TestBlockSize:
    """The number of tokens in a KV block."""

    def test_cpu_accepts_a_large_block_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        pool = ChainInProcess(load_cluster(str(write(tmp_path, kv_block_tokens=256)))).shards["top-0"].pool
        assert (pool.block_tokens, pool.tokens) == (256, 8192)

    def test_unsupported_block_size_computes_without_the_kernel(
        self, tmp_path: Path, captures: list[CpuCapture]
    ) -> None:
        chain = ChainInProcess(load_cluster(str(write(tmp_path, kv_block_tokens=32))))
        answer = chain.generate(prompt(40), "weak", ("top-0",), ANSWER_TOKENS)
        assert answer == reference_for(tmp_path, "weak").generate(prompt(40), ANSWER_TOKENS)
        assert [capture.captured for capture in captures] == [0, 0]

    async def test_shards_with_different_block_sizes_refuse_each_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A chain over a CPU and a GPU is refused, unless the cluster file sets a block size."""
        # The last shard of a chain is built first.
        kernels = iter([reference_varlen, None])
        monkeypatch.setattr(build, "varlen_kernel_for", lambda device, dtype, head_dim: next(kernels))
        async with open_shards(write(tmp_path)) as shards:
            refused = "the tokens of a KV block of shard bottom-0 is 16, that of shard top-0 is 256"
            with pytest.raises(grpc.aio.AioRpcError, match=refused):
                await shards.generate(prompt(5), "weak", 1)


@pytest.mark.parametrize(("family", "fields"), [("granite", {}), ("llama", {"captured_decode": False})])
def test_passes_are_not_captured_where_the_model_or_the_config_excludes_it(
    family: str, fields: dict[str, Any], tmp_path: Path, captures: list[CpuCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of `transformers` and `captured_decode = false` exclude capturing; both still use the attention kernel."""
    monkeypatch.setitem(FAMILIES, "granite", {"residual_multiplier": 0.7, "attention_multiplier": 0.3})
    chain = ChainInProcess(load_cluster(str(write(tmp_path, family, **fields))))
    assert chain.shards["bottom-0"].pool.block_tokens == PAGE_TOKENS
    answer = chain.generate(prompt(40), "strong", ("top-0",), ANSWER_TOKENS)
    assert answer == reference_for(tmp_path, "strong").generate(prompt(40), ANSWER_TOKENS)
    assert [capture.captured for capture in captures] == [0, 0]
