"""Fixtures that all unit tests of a shard share."""

from __future__ import annotations

import pytest
import torch

from stitch.cluster import ClusterConfig, load_cluster
from tests.support.tiny_cluster import Layers, write_tiny_cluster

# The first bottom shard computes alone for routes that leave in it; the last top shard owns the head.
BOTTOMS: tuple[Layers, ...] = ((0, 2), (2, 4))
TOPS: tuple[Layers, ...] = ((2, 3), (3, 4))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    return load_cluster(str(write_tiny_cluster(tmp_path_factory.mktemp("pair"))))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    """Two shards of either model."""
    file = write_tiny_cluster(tmp_path_factory.mktemp("deep"), bottoms=BOTTOMS, tops=TOPS)
    return load_cluster(str(file))
