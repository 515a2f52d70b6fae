"""A tenant can't tell from the speed of its answers which prompts another tenant has sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from random import Random

import pytest

from stitch.client import Client
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster

SHARDS = ("bottom-0", "top-0")
TRIES = 12
# Who guesses is right in three of twelve tries, and in more than this many in one of 2,000 times.
MAX_RIGHT_GUESSES = 8
DIAGNOSES = ("asthma", "diabetes", "migraine", "anaemia")
KEYS = {"clinic": "key-of-the-clinic", "stranger": "key-of-a-stranger"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("pair")
    hashed = {tenant: hashlib.sha256(key.encode()).hexdigest() for tenant, key in KEYS.items()}
    sections = [f'[tenants.{tenant}]\nkeys = ["{digest}"]\n' for tenant, digest in hashed.items()]
    (folder / "keys.toml").write_text("\n".join(sections))
    file = write_tiny_cluster(folder)
    fields = json.loads(file.read_text())
    fields["gateway"]["keys"] = "keys.toml"
    file.write_text(json.dumps(fields))
    with running_cluster(file, tmp_path_factory.mktemp("run")) as running:
        yield running


def prompts(number: int) -> list[str]:
    """Four long prompts that differ from their first word on."""
    draw = Random(number)
    return [f"{name} {number}: " + "".join(draw.choices("abcdefgh", k=600)) for name in DIAGNOSES]


def reused_tokens(cluster: Cluster) -> float:
    return sum(cluster.metric(name, "stitch_prefix_tokens_reused_total") for name in SHARDS)


def ttft(client: Client, prompt: str) -> float:
    return client.generate(prompt, route="weak", max_tokens=1, ignore_eos=True).ttft_seconds or 0.0


def test_another_tenants_prompts_are_not_recognized(cluster: Cluster) -> None:
    clients = {tenant: Client(cluster.gateway, key=key) for tenant, key in KEYS.items()}
    secrets, right = Random(0).choices(range(len(DIAGNOSES)), k=TRIES), 0
    for number, secret in enumerate(secrets):
        asked = prompts(number)
        ttft(clients["clinic"], asked[secret])
        before = reused_tokens(cluster)
        times = [ttft(clients["stranger"], prompt) for prompt in asked]
        assert reused_tokens(cluster) == before
        right += times.index(min(times)) == secret
    print(f"{right} of {TRIES} guessed")
    assert right <= MAX_RIGHT_GUESSES
    for client in clients.values():
        client.close()


def test_a_tenant_reuses_its_own_prompts(cluster: Cluster) -> None:
    with Client(cluster.gateway, key=KEYS["clinic"]) as client:
        prompt = prompts(TRIES)[0]
        ttft(client, prompt)
        before = reused_tokens(cluster)
        ttft(client, prompt)
    assert reused_tokens(cluster) > before
