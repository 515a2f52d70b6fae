"""KV capacity follows from configuration or memory, and plans match what loaded shards take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import ClusterConfig, ComputeConfig, load_cluster
from stitch_server import cpu, kv_sizing
from stitch_server.build import load_stage
from stitch_server.kv_cache.block_pool import BLOCK_TOKENS
from stitch_server.kv_cache.store import KVStore
from stitch_server.kv_sizing import (
    CPU_SHARE,
    MAX_CONTEXTS,
    SESSION_TOKENS,
    free_bytes,
    kv_bytes_per_token,
    kv_tokens,
    kv_tokens_beside_states,
    plan,
    table,
)
from tests.support.tiny_cluster import write_tiny_cluster

CPU = torch.device("cpu")
FREE = 1 << 30


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_sizing, "free_bytes", lambda device: FREE)


@pytest.mark.parametrize(("configured", "tokens"), [(16, 16), (100, 96), (8192, 8192), (1, 16)])
def test_configured_tokens_are_rounded_to_whole_blocks(configured: int, tokens: int) -> None:
    assert kv_tokens(configured, 1 << 60, 2048, CPU) == tokens


def test_default_is_a_share_of_free_memory() -> None:
    planned = kv_tokens(0, 1024, 1 << 30, CPU)
    assert planned == int(FREE * CPU_SHARE) // 1024
    assert planned % BLOCK_TOKENS == 0


def test_gpu_share_is_larger_than_the_cpu_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kv_tokens(0, 1024, 1 << 30, torch.device("cuda", 0)) > 3 * kv_tokens(0, 1024, 1 << 30, CPU)


def test_weights_not_yet_loaded_are_subtracted() -> None:
    assert kv_tokens(0, 1024, 1 << 30, CPU, FREE // 2) == pytest.approx(kv_tokens(0, 1024, 1 << 30, CPU) / 2, abs=16)
    assert kv_tokens(0, 1024, 1 << 30, CPU, 2 * FREE) == BLOCK_TOKENS


@pytest.mark.parametrize(("state_bytes", "most", "left"), [(0, 1 << 29, FREE), (64, 1 << 20, FREE - (1 << 20))])
def test_hidden_states_leave_the_rest_of_the_memory(state_bytes: int, most: int, left: int) -> None:
    compute = ComputeConfig(state_cache_bytes=most)
    tokens = kv_tokens_beside_states(compute, 1024, state_bytes, 1 << 30, CPU)
    assert tokens == kv_tokens(0, 1024, 1 << 30, CPU, memory_bytes=left)


def test_hidden_states_take_no_more_than_those_of_all_tokens() -> None:
    compute = ComputeConfig(state_cache_bytes=1 << 40)
    tokens = kv_tokens_beside_states(compute, 1024, 1024, 1 << 30, CPU)
    assert tokens == kv_tokens(0, 2048, 1 << 30, CPU)


def test_capacity_is_capped_at_max_contexts() -> None:
    assert kv_tokens(0, 1, 100, CPU) == MAX_CONTEXTS * 100


def test_capacity_is_at_least_one_block() -> None:
    assert kv_tokens(0, 1 << 60, 2048, CPU) == BLOCK_TOKENS


@pytest.mark.parametrize(("configured", "tokens"), [(1000, 768), (100, 256)])
def test_tokens_are_rounded_to_larger_blocks(configured: int, tokens: int) -> None:
    assert kv_tokens(configured, 1 << 60, 2048, CPU, block_tokens=256) == tokens


def test_bytes_per_token_match_the_store() -> None:
    store = KVStore(5, 8, blocks=4, kv_heads=2, head_dim=8, device=CPU, dtype=torch.bfloat16)
    per_token = kv_bytes_per_token(3, 2, 8, torch.bfloat16)
    assert per_token * 4 * BLOCK_TOKENS == store.kv.nbytes


def test_cpu_has_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert free_bytes(CPU) > 0


def tiny(folder: Path, **compute: Any) -> ClusterConfig:
    return load_cluster(str(write_tiny_cluster(folder, bottoms=((0, 2), (2, 4)), tops=((2, 4),), **compute)))


def test_plans_are_in_the_order_of_the_cluster_file(tmp_path: Path) -> None:
    plans = plan(tiny(tmp_path), CPU)
    assert [(one.shard, one.layers) for one in plans] == [
        ("bottom-0", "bottom 0 to 1"),
        ("bottom-1", "bottom 2 to 3"),
        ("top-0", "top 2 to 3"),
    ]


def test_planned_kv_matches_the_loaded_shard(tmp_path: Path) -> None:
    cluster = tiny(tmp_path, kv_tokens=4096)
    for one, config in zip(plan(cluster, CPU), cluster.shards, strict=True):
        loaded = load_stage(cluster, config, CPU)
        model = loaded.model
        layers = config.layers[1] - config.layers[0]
        assert one.kv_bytes_per_token == kv_bytes_per_token(layers, model.kv_heads, model.head_dim, torch.float32)
        assert (one.kv_tokens, one.sessions) == (4096, 4096 // SESSION_TOKENS)


def test_first_shard_plans_the_embedding_and_last_the_head(tmp_path: Path) -> None:
    cluster = tiny(tmp_path)
    first, middle, last = plan(cluster, CPU)
    embedding = load_stage(cluster, cluster.shard("bottom-0"), CPU).count.head * torch.float32.itemsize
    assert first.weight_bytes == middle.weight_bytes + embedding
    top = load_stage(cluster, cluster.shard("top-0"), CPU).count
    assert last.weight_bytes == (top.between(2, 4) + top.head) * torch.float32.itemsize
    assert (first.link_bytes_per_token, last.link_bytes_per_token) == (middle.link_bytes_per_token, 0)


def test_shards_of_both_ends_plan_what_they_load(tmp_path: Path) -> None:
    layouts = {"bottoms": ((0, 2), (2, 5)), "tops": ((0, 4),)}
    cluster = load_cluster(str(write_tiny_cluster(tmp_path, **layouts, with_ends=True)))
    first, last_bottom, top = plan(cluster, CPU)
    bottom_count, top_count = (load_stage(cluster, cluster.shard(name), CPU).count for name in ("bottom-0", "top-0"))
    size = torch.float32.itemsize
    assert first.weight_bytes == (bottom_count.head + bottom_count.between(0, 2)) * size
    assert last_bottom.weight_bytes == (bottom_count.between(2, 5) + bottom_count.head) * size
    assert top.weight_bytes == (top_count.between(0, 4) + 2 * top_count.head) * size
    assert (last_bottom.link_bytes_per_token, top.link_bytes_per_token) == (first.link_bytes_per_token, 0)


@pytest.mark.parametrize(
    ("dtype", "in_onednn", "times"), [("float32", True, 1), ("bfloat16", True, 2), ("bfloat16", False, 1)]
)
@pytest.mark.parametrize(("device", "fields"), [("cpu", {"kernels": False}), ("cuda", {})])
def test_bfloat16_weights_count_twice_with_compiled_kernels_beside_onednn(
    tmp_path: Path,
    device: str,
    fields: dict[str, Any],
    dtype: str,
    in_onednn: bool,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stitch_server.model.weights.has_onednn", lambda device, dtype: in_onednn)
    compiled = plan(tiny(tmp_path, dtype=dtype), CPU)
    once = plan(tiny(tmp_path, kv_tokens=64, dtype=dtype, **fields), torch.device(device))
    assert [one.weight_bytes for one in compiled[1:]] == [times * one.weight_bytes for one in once[1:]]


@pytest.mark.parametrize(("in_onednn", "heads"), [(True, 2), (False, 1)])
def test_only_the_head_counts_twice_for_layers_of_transformers(
    tmp_path: Path, in_onednn: bool, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiny_cluster(tmp_path, "olmo2", bottoms=((0, 4),), tops=((2, 4),), dtype="bfloat16")
    cluster = load_cluster(str(file))
    bottom, top = (load_stage(cluster, config, CPU).count for config in cluster.shards)
    monkeypatch.setattr("stitch_server.model.weights.has_onednn", lambda device, dtype: in_onednn)
    first, last = plan(cluster, CPU)
    assert first.weight_bytes == (bottom.between(0, 4) + bottom.head) * torch.bfloat16.itemsize
    assert last.weight_bytes == (top.between(2, 4) + heads * top.head) * torch.bfloat16.itemsize


@pytest.mark.parametrize(("kernels", "tiles", "times"), [(False, False, 4), (True, False, 2), (True, True, 4)])
def test_int8_weights_take_a_quarter_of_float32_except_the_embedding(
    tmp_path: Path, kernels: bool, tiles: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice that on a CPU without AMX, where kernels and oneDNN keep a copy each."""
    monkeypatch.setattr(cpu, "has_amx", lambda: tiles)
    whole, small = (plan(tiny(tmp_path, kernels=kernels, quantization=kind), CPU) for kind in ("none", "int8"))
    assert [one.weight_bytes * times for one in small[1:]] == [one.weight_bytes for one in whole[1:]]
    assert small[0].weight_bytes - small[1].weight_bytes == whole[0].weight_bytes - whole[1].weight_bytes


@pytest.mark.parametrize("kernels", [True, False])
def test_int4_weights_take_five_bits_and_the_head_eight(
    tmp_path: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    cluster = tiny(tmp_path, kernels=kernels, quantization="int4")
    *_, middle, last = plan(cluster, CPU)
    layers = load_stage(cluster, cluster.shard("bottom-1"), CPU).count
    top = load_stage(cluster, cluster.shard("top-0"), CPU).count
    assert middle.weight_bytes == layers.between(*cluster.shard("bottom-1").layers) * 5 // 8
    assert last.weight_bytes == top.between(2, 4) * 5 // 8 + top.head


def test_bfloat16_on_the_wire_halves_link_bytes(tmp_path: Path) -> None:
    (whole, *_), (half, *_) = (plan(tiny(tmp_path, wire_dtype=dtype), CPU) for dtype in ("float32", "bfloat16"))
    assert half.link_bytes_per_token * 2 == whole.link_bytes_per_token > 0


def test_table_has_a_line_for_each_shard(tmp_path: Path) -> None:
    head, *rows, foot = table(plan(tiny(tmp_path, kv_tokens=4096), CPU)).splitlines()
    assert head.split()[0] == "shard"
    assert [row.split()[0] for row in rows] == ["bottom-0", "bottom-1", "top-0"]
    assert all("4,096" in row for row in rows)
    assert "1,024 tokens" in foot


def test_plan_for_given_memory_needs_no_gpu(tmp_path: Path) -> None:
    cluster, cuda = tiny(tmp_path, kv_tokens=0), torch.device("cuda")
    less, more = (plan(cluster, cuda, memory)[0] for memory in (10_000_000, 20_000_000))
    assert less.kv_tokens * less.kv_bytes_per_token <= 0.9 * (10_000_000 - less.weight_bytes)
    assert 0 < less.kv_tokens < more.kv_tokens
