"""Fixtures: a cluster with real weights, and fake programs that replace the servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_programs import installed
from tests.support.processes import Cluster, running_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces `stitch_server.cli` and `router_gateway.cli` by fake programs, and gives the test its own cache."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(installed(tmp_path / "programs"))


@pytest.fixture(scope="session")
def smollm2_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The preset `smollm2` with its real weights, shared by the tests with the marker `smollm2`."""
    with running_cluster("smollm2", tmp_path_factory.mktemp("smollm2-run")) as cluster:
        yield cluster
