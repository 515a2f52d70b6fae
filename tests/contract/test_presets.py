"""The cluster files that the package ships are valid, complete clusters."""

from __future__ import annotations

import pytest

from stitch.cluster import ClusterConfig, load_cluster, presets


@pytest.fixture(params=presets())
def preset(request: pytest.FixtureRequest) -> ClusterConfig:
    return load_cluster(request.param)


def test_default_cluster_is_a_preset() -> None:
    assert "smollm2" in presets()


def test_every_route_has_shards_for_all_its_layers(preset: ClusterConfig) -> None:
    for route in preset.routes:
        stages = preset.stages(route)
        assert all(stages)
        assert [stage[0].role for stage in stages] == sorted(stage[0].role for stage in stages)
        assert stages[0][0].layers[0] == 0
        assert stages[-1][0].role == ("bottom" if route.top_from is None else "top")


def test_every_stitch_is_shipped(preset: ClusterConfig) -> None:
    stitches = [preset.stitch_file(route) for route in preset.routes]
    missing = [path.name for path in stitches if path is not None and not path.is_file()]
    assert missing == []


def test_default_cluster_uses_loopback_addresses() -> None:
    default = load_cluster("smollm2")
    addresses = [default.gateway.address, *(shard.address for shard in default.shards)]
    assert all(address.startswith("127.0.0.1:") for address in addresses)
