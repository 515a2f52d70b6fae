"""A gateway takes the learned router that its cluster file names, and refuses another cluster's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_gateway.routing.learned.artifact import RouterArtifact, fingerprint_of, save_router
from router_gateway.routing.router import Query
from router_gateway.server import router_of
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.support.word_model import word_model


async def cluster_with(folder: Path, *routes: str) -> ClusterConfig:
    model = word_model({"prove": 0.5, "hello": -0.25}, routes=routes)
    percentiles = tuple(np.linspace(-0.25, 0.5, 101).tolist())
    save_router(
        RouterArtifact(model, (0.1,), percentiles, {"data": []}, fingerprint_of(model)), folder / "r.safetensors"
    )
    async with fake_cluster(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as cluster:
        gateway = cluster.gateway.model_copy(update={"router": "r.safetensors"})
        return cluster.model_copy(update={"gateway": gateway, "folder": folder})


async def test_the_named_router_judges(tmp_path: Path) -> None:
    router, calibration = router_of(await cluster_with(tmp_path, "weak", "strong"))
    decisions = [router.decide(Query((text,), ("weak", "strong"))) for text in ("prove it", "hello you")]
    assert [decision.route for decision in decisions] == ["strong", "weak"]
    assert decisions[0].reason == "gain 0.50 > 0.10"
    assert decisions[0].qualities == (0.5, 1.0)
    assert calibration is not None
    assert calibration() is None


async def test_a_router_of_other_routes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="disagree on large, strong"):
        router_of(await cluster_with(tmp_path, "weak", "large"))
