"""A cluster of real processes that use TLS and trust only one certificate authority."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch import health
from stitch.channels import serves
from stitch.cli.main import main
from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.local.cluster import keep_port
from stitch.tls import GATEWAY, Tls, TlsFiles, read_tls
from tests.support.certificates import write_certificates
from tests.support.processes import Cluster, running_cluster
from tests.support.resolved_program import ADDRESSES
from tests.support.tiny_cluster import write_tiny_cluster
from tests.support.waiting import becomes_true

ENTRY, HOST, FOUND = "more", "more.test", "more-127-0-0-2"
FIELDS: dict[str, Any] = {"route": "strong", "max_tokens": 8, "ignore_eos": True}
START_SECONDS = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, str]:
    """The section `tls`. There is a certificate for an entry, too, that the cluster gets later."""
    file = write_tiny_cluster(folder)
    fields = json.loads(file.read_text())
    fields["shards"].append({**fields["shards"][-1], "name": ENTRY, "address": f"dns:{HOST}:1"})
    (folder / "later.json").write_text(json.dumps(fields))
    return write_certificates(load_cluster(str(folder / "later.json")), folder / "certificates")


@pytest.fixture(scope="module")
def addresses(folder: Path) -> Iterator[Path]:
    """The file that has the addresses of hosts."""
    file = folder / "addresses.json"
    file.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADDRESSES, str(file))
        yield file


@pytest.fixture(scope="module")
def cluster(folder: Path, files: dict[str, str], addresses: Path) -> Iterator[Cluster]:
    file = folder / "cluster.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tls": files}))
    with running_cluster(file, folder / "run", runner="tests.support.resolved_program") as cluster:
        yield cluster


def loaded(files: dict[str, str], name: str = GATEWAY) -> Tls:
    return read_tls(TlsFiles(**files), Path(), name)


def test_answer_passes_both_hops_over_tls(cluster: Cluster) -> None:
    answer = cluster.generate("stitch", **FIELDS)
    assert len(answer.token_ids) == 8


def test_command_with_authority_reaches_the_gateway(
    cluster: Cluster, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gateway", cluster.gateway, "--authority", files["authority"].replace("{name}", GATEWAY)]
    assert main(["ask", "--plain", "stitch", "--max-tokens", "2", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["generated_tokens"] == 2


def test_client_without_the_authority_fails(cluster: Cluster, tmp_path: Path) -> None:
    write_certificates(load_cluster(str(cluster.file)), tmp_path)
    for authority in (None, tmp_path / "authority.pem"):
        with Client(cluster.gateway, authority) as client, pytest.raises(Unavailable):
            client.generate("stitch", max_tokens=1, timeout=5)


def test_shard_refuses_client_without_a_certificate_of_the_authority(
    cluster: Cluster, files: dict[str, str], tmp_path: Path
) -> None:
    ours, others = loaded(files), loaded(write_certificates(load_cluster(str(cluster.file)), tmp_path))
    anonymous = grpc.ssl_channel_credentials(ours.authority)
    foreign = grpc.ssl_channel_credentials(ours.authority, others.key, others.certificate)
    for name in ("bottom-0", "top-0"):
        assert serves(cluster.address(name), ours.client())
        for credentials in (None, anonymous, foreign):
            assert not serves(cluster.address(name), credentials)


def test_gateway_accepts_client_without_a_certificate(cluster: Cluster, files: dict[str, str]) -> None:
    trusting = grpc.ssl_channel_credentials(loaded(files).authority)
    with grpc.secure_channel(cluster.gateway, trusting) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_health_check_of_a_container_asks_with_the_process_own_certificate(cluster: Cluster, tmp_path: Path) -> None:
    assert [health.main([str(cluster.file), name]) for name in cluster.names] == [0, 0, 0]
    fields = json.loads(cluster.file.read_text())
    # Where another shard answers at the address, or nobody does.
    fields["shards"][0]["address"], fields["gateway"]["address"] = cluster.address("top-0"), "127.0.0.1:1"
    (tmp_path / "moved.json").write_text(json.dumps(fields))
    assert [health.main([str(tmp_path / "moved.json"), name]) for name in cluster.names] == [1, 0, 1]


def test_replica_that_dns_has_shows_the_certificate_of_its_entry(cluster: Cluster, addresses: Path) -> None:
    expected = cluster.generate("stitch", **FIELDS)
    *others, top = cluster.shards
    with ExitStack() as ports:
        port, metrics_port = keep_port(ports, "127.0.0.2"), keep_port(ports)
        entry = {**top, "name": ENTRY, "address": f"dns:{HOST}:{port}", "metrics_port": metrics_port}
        cluster.write_shards([*others, top, entry])
        cluster.start(ENTRY, listen=f"127.0.0.2:{port}")
        addresses.write_text(json.dumps({HOST: ["127.0.0.2"]}))

        def serving() -> list[str]:
            return [shard.name for shard in cluster.client.describe().shards if shard.serving]

        assert becomes_true(lambda: FOUND in serving(), START_SECONDS)
        # The other replica goes away, so that this one has to answer.
        cluster.write_shards([*others, entry])
        assert becomes_true(lambda: serving() == ["bottom-0", FOUND], START_SECONDS)
        assert cluster.generate("stitch", **FIELDS).token_ids == expected.token_ids
        assert cluster.metric(ENTRY, "stitch_batch_tokens_count") > 0
