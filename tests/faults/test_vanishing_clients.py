"""Clients that vanish at random moments leave nothing in any process: no KV, no memory, no descriptor, no task."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.processes import Cluster
from tests.support.vanishing_clients import Footprint, holds_nothing, vanish
from tests.support.waiting import becomes_true

# The figure; a busy machine gets more.
RELEASE_SECONDS = 2.0
PATIENT_SECONDS = 20.0
# What allocators keep: over thousands of clients the last shard grows by some 60 MB, ever more slowly, and then stops.
RESIDENT_MB = 48.0
# gRPC's own pool gets a thread where its others wait for a busy CPU: over 6,000 clients, one.
THREADS = 2.0

pytestmark = pytest.mark.slow


def grown(before: Footprint, after: Footprint) -> list[str]:
    """What is more than before."""
    found = []
    for what, limit in (("descriptors", 0.0), ("tasks", 0.0), ("threads", THREADS), ("resident_mb", RESIDENT_MB)):
        earlier, later = getattr(before, what), getattr(after, what)
        found += [
            f"{name}: {what} {earlier[name]:g} → {later[name]:g}"
            for name in later
            if later[name] > earlier[name] + limit
        ]
    return found


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("clients", "limit_seconds"), [(50, PATIENT_SECONDS), pytest.param(1_000, RELEASE_SECONDS, marks=pytest.mark.full)]
)
def test_vanished_clients_leave_nothing(
    tiny_cluster: Cluster, clients: int, limit_seconds: float, protocol: str
) -> None:
    cluster = tiny_cluster
    # Caches fill, and pools of threads grow, with the first ones.
    asyncio.run(vanish(cluster, clients, 1, protocol))
    assert becomes_true(lambda: holds_nothing(cluster), PATIENT_SECONDS)
    before = Footprint(cluster)
    asyncio.run(vanish(cluster, clients, 2, protocol))
    assert becomes_true(lambda: holds_nothing(cluster), limit_seconds)
    assert becomes_true(lambda: not grown(before, Footprint(cluster)), limit_seconds), grown(before, Footprint(cluster))
    assert cluster.generate("stitch", route="weak", max_tokens=4, ignore_eos=True).generated_tokens == 4
