"""The cluster files that come with the package describe clusters. Starts none of them."""

from __future__ import annotations

import pytest

from stitch.cluster import ClusterConfig, load_cluster, presets


@pytest.fixture(params=presets())
def preset(request: pytest.FixtureRequest) -> ClusterConfig:
    return load_cluster(request.param)


def test_the_default_is_among_them() -> None:
    assert "smollm2" in presets()


def test_every_route_has_a_shard_for_every_layer_it_passes(preset: ClusterConfig) -> None:
    for route in preset.routes:
        stages = preset.stages(route)
        assert all(stages)
        assert [stage[0].role for stage in stages] == sorted(stage[0].role for stage in stages)
        assert stages[0][0].layers[0] == 0
        assert stages[-1][0].role == "top"


def test_every_stitch_is_shipped(preset: ClusterConfig) -> None:
    stitches = [preset.stitch_file(route) for route in preset.routes]
    missing = [path.name for path in stitches if path is not None and not path.is_file()]
    assert missing == []


def test_the_default_runs_on_one_machine() -> None:
    default = load_cluster("smollm2")
    addresses = [default.gateway.address, *(shard.address for shard in default.shards)]
    assert all(address.startswith("127.0.0.1:") for address in addresses)
