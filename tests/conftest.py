"""What all tests share: their order, a cluster, one thread, SIGINT's default, and a check that servers are stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

ROOT = Path(__file__).parent

if TYPE_CHECKING:
    from tests.support.processes import Cluster

# A shell that runs the tests in its background has SIGINT ignored, and every process that a test starts would inherit
# that: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests run first: at the end of a parallel run, no process waits long for a file of another one."""
    quick = [ROOT / "unit", ROOT / "contract"]

    def is_quick(item: pytest.Item) -> bool:
        return item.get_closest_marker("slow") is None and any(map(item.path.is_relative_to, quick))

    items.sort(key=is_quick)


def pytest_collection_finish() -> None:
    """PyTorch computes on one thread: several that wait for each other's small shares take the CPU from other tests."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _servers_are_stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaves a server running: collected as garbage, it would fail a later test."""
    opened: list[Any] = []
    make = grpc.aio.server

    def server(*arguments: Any, **options: Any) -> grpc.aio.Server:
        opened.append(make(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(grpc.aio, "server", server)
    yield
    assert not [one for one in opened if one._server.is_running()]


@pytest.fixture(scope="session")
def tiny_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A tiny random pair on one bottom and one top shard, shared by all tests, which leave it running and idle."""
    # Tests that need no cluster import no torch.
    from tests.support.processes import running_cluster
    from tests.support.tiny_cluster import write_tiny_cluster

    file = write_tiny_cluster(tmp_path_factory.mktemp("tiny-pair"))
    with running_cluster(file, tmp_path_factory.mktemp("tiny-run")) as cluster:
        yield cluster
