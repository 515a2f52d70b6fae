"""Each shard of a tiny cluster holds its own part of the pair, and none that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stitch.cluster import ClusterConfig, RouteConfig, ShardConfig, load_cluster
from stitch.errors import Incompatible
from stitch_server.build import layer_range_of, load_stage
from stitch_server.engine.types import LayerRange
from tests.support.tiny_cluster import Layers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("role", "layers", "cut"),
    [
        ("bottom", (0, 10), LayerRange(0, 6)),
        ("bottom", (0, 4), LayerRange(0, 4)),
        ("bottom", (4, 10), LayerRange(4, 6)),
        ("bottom", (6, 10), None),
        ("top", (0, 10), LayerRange(3, 10)),
        ("top", (4, 10), LayerRange(4, 10)),
        ("top", (2, 4), LayerRange(3, 4)),
        ("top", (0, 3), None),
    ],
)
def test_a_route_passes_the_layers_between_its_cuts(role: Any, layers: Layers, cut: LayerRange | None) -> None:
    route = RouteConfig(name="weak", bottom_layers=6, top_from=3, stitch="s")
    assert layer_range_of(route, ShardConfig(name="a", role=role, layers=layers, address="a:1")) == cut


def test_the_first_shard_embeds_and_the_last_has_the_head(deep: ClusterConfig) -> None:
    ends = [
        (part.embedding is not None, part.head is not None)
        for part in (load_stage(deep, place, CPU) for place in deep.shards)
    ]
    assert ends == [(True, False), (False, False), (False, False), (False, True)]


def test_each_has_the_stitches_of_the_routes_that_enter_there(deep: ClusterConfig) -> None:
    held = [sorted(load_stage(deep, place, CPU).stitches) for place in deep.shards]
    assert held == [[], [], ["weak"], ["strong"]]


def test_each_has_the_adapters_of_its_layers(deep: ClusterConfig) -> None:
    """Only the stitch of `weak` brings some; it enters on the first of both top shards."""
    held = [load_stage(deep, place, CPU).adapters for place in deep.shards]
    assert [{name: (one.first, one.end) for name, one in part.items()} for part in held] == [
        {}, {}, {"weak": (2, 3)}, {"weak": (3, 4)}
    ]  # fmt: skip


def test_each_has_the_cuts_of_the_routes_that_pass(deep: ClusterConfig) -> None:
    cuts = [load_stage(deep, place, CPU).layer_ranges for place in deep.shards]
    assert cuts == [
        {"weak": LayerRange(0, 2), "strong": LayerRange(0, 2)},
        {"weak": LayerRange(2, 3), "strong": LayerRange(2, 4)},
        {"weak": LayerRange(2, 3)},
        {"weak": LayerRange(3, 4), "strong": LayerRange(3, 4)},
    ]


def test_layers_that_the_model_lacks_are_refused(cluster: ClusterConfig) -> None:
    place = ShardConfig(name="a", role="bottom", layers=(0, 9), address="a:1")
    with pytest.raises(Incompatible, match="layers 0 to 9 are no range"):
        load_stage(cluster, place, CPU)


def changed(cluster: ClusterConfig, change: Callable[[dict[str, Any]], object], tmp_path: Path) -> ClusterConfig:
    """A cluster file that says something else of the same files."""
    fields = json.loads((cluster.folder / "cluster.json").read_text())
    for model in fields["models"].values():
        model["source"] = str(cluster.folder / model["source"])
    for route in fields["routes"]:
        route["stitch"] = str(cluster.folder / route["stitch"])
    change(fields)
    (tmp_path / "cluster.json").write_text(json.dumps(fields))
    return load_cluster(str(tmp_path / "cluster.json"))


def test_a_stitch_for_another_cut_is_refused(cluster: ClusterConfig, tmp_path: Path) -> None:
    other = changed(cluster, lambda fields: fields["routes"][0].update(bottom_layers=2), tmp_path)
    with pytest.raises(Incompatible, match="from layer 3 to 2 can't serve a cut from layer 2 to 2"):
        load_stage(other, other.shard("top-0"), CPU)


def test_a_stitch_for_another_model_is_refused(cluster: ClusterConfig, tmp_path: Path) -> None:
    def swap(fields: dict[str, Any]) -> None:
        fields["models"]["top"] = fields["models"]["bottom"]

    other = changed(cluster, swap, tmp_path)
    with pytest.raises(Incompatible, match="made for the top model"):
        load_stage(other, other.shard("top-0"), CPU)


def test_a_stitch_that_is_gone_is_named(cluster: ClusterConfig, tmp_path: Path) -> None:
    other = changed(cluster, lambda fields: fields["routes"][0].update(stitch="gone.safetensors"), tmp_path)
    with pytest.raises(Incompatible, match=r"gone\.safetensors is no stitch"):
        load_stage(other, other.shard("top-0"), CPU)
