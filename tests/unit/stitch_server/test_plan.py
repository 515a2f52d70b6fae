"""What a cluster's shards are said to take is what they take once they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import ClusterConfig, load_cluster
from stitch_server.build import load_stage
from stitch_server.cpu import features as processor
from stitch_server.kv_sizing import kv_bytes_per_token
from stitch_server.plan import SESSION_TOKENS, plan, table
from tests.support.tiny_cluster import write_tiny_cluster

CPU = torch.device("cpu")


def tiny(folder: Path, **compute: Any) -> ClusterConfig:
    return load_cluster(str(write_tiny_cluster(folder, bottoms=((0, 2), (2, 4)), tops=((2, 4),), **compute)))


def test_every_shard_has_a_plan_in_the_order_of_the_file(tmp_path: Path) -> None:
    plans = plan(tiny(tmp_path), CPU)
    assert [(one.shard, one.layers) for one in plans] == [
        ("bottom-0", "bottom 0 to 1"),
        ("bottom-1", "bottom 2 to 3"),
        ("top-0", "top 2 to 3"),
    ]


def test_kv_is_what_the_shard_s_store_takes(tmp_path: Path) -> None:
    cluster = tiny(tmp_path, kv_tokens=4096)
    for one, place in zip(plan(cluster, CPU), cluster.shards, strict=True):
        part = load_stage(cluster, place, CPU)
        model = part.model
        layers = place.layers[1] - place.layers[0]
        assert one.kv_bytes_per_token == kv_bytes_per_token(layers, model.kv_heads, model.head_dim, torch.float32)
        assert (one.kv_tokens, one.sessions) == (4096, 4096 // SESSION_TOKENS)


def test_the_ends_of_the_chain_take_embedding_and_head(tmp_path: Path) -> None:
    cluster = tiny(tmp_path)
    first, middle, last = plan(cluster, CPU)
    embedding = load_stage(cluster, cluster.shard("bottom-0"), CPU).count.head * torch.float32.itemsize
    assert first.weight_bytes == middle.weight_bytes + embedding
    top = load_stage(cluster, cluster.shard("top-0"), CPU).count
    assert last.weight_bytes == (top.between(2, 4) + top.head) * torch.float32.itemsize
    assert (first.link_bytes_per_token, last.link_bytes_per_token) == (middle.link_bytes_per_token, 0)


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1), ("bfloat16", 2)])
@pytest.mark.parametrize(("device", "fields"), [("cpu", {"kernels": False}), ("cuda", {})])
def test_kernels_keep_what_is_not_float32_twice(
    tmp_path: Path, device: str, fields: dict[str, Any], dtype: str, times: int
) -> None:
    compiled = plan(tiny(tmp_path, dtype=dtype), CPU)
    once = plan(tiny(tmp_path, kv_tokens=64, dtype=dtype, **fields), torch.device(device))
    assert [one.weight_bytes for one in compiled[1:]] == [times * one.weight_bytes for one in once[1:]]


def test_of_families_without_lean_layers_only_the_head_is_kept_twice(tmp_path: Path) -> None:
    file = write_tiny_cluster(tmp_path, "olmo2", bottoms=((0, 4),), tops=((2, 4),), dtype="bfloat16")
    cluster = load_cluster(str(file))
    first, last = plan(cluster, CPU)
    bottom, top = (load_stage(cluster, place, CPU).count for place in cluster.shards)
    assert first.weight_bytes == (bottom.between(0, 4) + bottom.head) * torch.bfloat16.itemsize
    assert last.weight_bytes == (top.between(2, 4) + 2 * top.head) * torch.bfloat16.itemsize


@pytest.mark.parametrize(("kernels", "tiles", "times"), [(False, False, 4), (True, False, 2), (True, True, 4)])
def test_bytes_take_a_quarter_of_float32_except_the_embedding(
    tmp_path: Path, kernels: bool, tiles: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice that where kernels and a library need them in two ways."""
    monkeypatch.setattr(processor, "has_tiles", lambda: tiles)
    whole, small = (plan(tiny(tmp_path, kernels=kernels, quantization=kind), CPU) for kind in ("none", "int8"))
    assert [one.weight_bytes * times for one in small[1:]] == [one.weight_bytes for one in whole[1:]]
    assert small[0].weight_bytes - small[1].weight_bytes == whole[0].weight_bytes - whole[1].weight_bytes


@pytest.mark.parametrize("kernels", [True, False])
def test_four_bits_and_their_groups_take_five_but_the_head_eight(
    tmp_path: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_tiles", lambda: True)
    cluster = tiny(tmp_path, kernels=kernels, quantization="int4")
    *_, middle, last = plan(cluster, CPU)
    layers = load_stage(cluster, cluster.shard("bottom-1"), CPU).count
    top = load_stage(cluster, cluster.shard("top-0"), CPU).count
    assert middle.weight_bytes == layers.between(*cluster.shard("bottom-1").layers) * 5 // 8
    assert last.weight_bytes == top.between(2, 4) * 5 // 8 + top.head


def test_half_the_wire_dtype_is_half_the_link(tmp_path: Path) -> None:
    (whole, *_), (half, *_) = (plan(tiny(tmp_path, wire_dtype=dtype), CPU) for dtype in ("float32", "bfloat16"))
    assert half.link_bytes_per_token * 2 == whole.link_bytes_per_token > 0


def test_the_table_has_a_line_for_each_shard(tmp_path: Path) -> None:
    head, *rows, foot = table(plan(tiny(tmp_path, kv_tokens=4096), CPU)).splitlines()
    assert head.split()[0] == "shard"
    assert [row.split()[0] for row in rows] == ["bottom-0", "bottom-1", "top-0"]
    assert all("4,096" in row for row in rows)
    assert "1,024 tokens" in foot


def test_a_plan_for_other_machines_needs_none_of_their_devices(tmp_path: Path) -> None:
    cluster, cuda = tiny(tmp_path, kv_tokens=0), torch.device("cuda")
    less, more = (plan(cluster, cuda, memory)[0] for memory in (10_000_000, 20_000_000))
    assert less.kv_tokens * less.kv_bytes_per_token <= 0.9 * (10_000_000 - less.weight_bytes)
    assert 0 < less.kv_tokens < more.kv_tokens
