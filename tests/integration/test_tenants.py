"""Tenants of a running cluster: their keys, their shares, and a keys file that is replaced while it runs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from router_gateway.admission.tenants import hash_key
from stitch.client import AsyncClient, Client
from stitch.errors import Unauthenticated
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.waiting import becomes_true

pytestmark = pytest.mark.slow

RELOAD_SECONDS = 10.0
# For about 16 requests.
KV_TOKENS = 1024
PROMPT, TOKENS = "question {number:05}" + 40 * "x", 4
# Of each message between the shards: requests wait for a slow link, however fast this machine's clients and shards are.
LINK_SECONDS = 0.02
LINK = ("bottom-0", "top-0")
# Clients of each tenant, which ask again at once, and how many of its requests wait when the count begins and ends.
CLIENTS, WAITING = 160, 40
SKIPPED, COUNTED = 80, 320
# Reading metrics takes the clients' time.
POLL_SECONDS = 0.2


def sections(**weights: int) -> str:
    """A keys file in which a tenant's key is its name."""
    return "\n".join(
        f'[tenants.{name}]\nkeys = ["{hash_key(name)}"]\nweight = {weight}' for name, weight in weights.items()
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(sections(one=1, three=3))
    return file


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Cluster]:
    file = write_tiny_cluster(tmp_path_factory.mktemp("pair"), kv_tokens=KV_TOKENS)
    fields = json.loads(file.read_text())
    fields["gateway"]["keys"] = str(keys)
    file.write_text(json.dumps(fields))
    with running_cluster(file, tmp_path_factory.mktemp("run"), gates=[LINK]) as running:
        yield running


async def finished_by_tenant(cluster: Cluster) -> Counter[str]:
    """The answers to equal questions of both tenants, in a time in which each has requests that wait."""
    finished: list[str] = []
    numbers = count()

    async def ask(name: str, client: AsyncClient) -> None:
        while True:
            prompt = PROMPT.format(number=next(numbers))
            await client.generate(prompt, route="strong", max_tokens=TOKENS, ignore_eos=True)
            finished.append(name)

    async def all_wait() -> bool:
        return await asyncio.to_thread(
            lambda: all(
                cluster.metric("gateway", "stitch_tenant_requests_waiting", tenant=name) >= WAITING
                for name in ("one", "three")
            )
        )

    async with AsyncClient(cluster.gateway, key="one") as one, AsyncClient(cluster.gateway, key="three") as three:
        clients = {"one": one, "three": three}
        tasks = [asyncio.create_task(ask(name, clients[name])) for _ in range(CLIENTS) for name in clients]
        while not await all_wait():
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(POLL_SECONDS)
        begin = len(finished) + SKIPPED
        while len(finished) < begin + COUNTED:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        assert await all_wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Counter(finished[begin : begin + COUNTED])


def test_answers_of_waiting_tenants_are_shared_by_weight(cluster: Cluster) -> None:
    cluster.gate(*LINK).delay(LINK_SECONDS)
    counts = asyncio.run(finished_by_tenant(cluster))
    cluster.gate(*LINK).heal()
    assert counts["three"] / counts["one"] == pytest.approx(3.0, rel=0.1)
    for name in ("one", "three"):
        assert cluster.metric("gateway", "stitch_tenant_work_total", tenant=name) > 0


def test_replaced_keys_are_in_force_without_a_restart(cluster: Cluster, keys: Path) -> None:
    with Client(cluster.gateway, key="one") as one, Client(cluster.gateway, key="new") as new:
        one.generate("before", max_tokens=1)
        with pytest.raises(Unauthenticated):
            new.generate("before", max_tokens=1)
        keys.write_text("broken")
        keys.write_text(sections(new=1))

        def is_known() -> bool:
            try:
                new.generate("after", max_tokens=1)
            except Unauthenticated:
                return False
            return True

        assert becomes_true(is_known, RELOAD_SECONDS)
        with pytest.raises(Unauthenticated):
            one.generate("after", max_tokens=1)
    with Client(cluster.gateway) as stranger, pytest.raises(Unauthenticated, match="needs a key"):
        stranger.describe()
    assert hash_key("new") not in cluster.log("gateway")
