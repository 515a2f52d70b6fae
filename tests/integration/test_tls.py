"""A cluster of real processes that use TLS and trust only one certificate authority."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stitch import health
from stitch.channels import serves
from stitch.cli.main import main
from stitch.client import Client
from stitch.cluster import load_cluster
from stitch.errors import Unavailable
from stitch.tls import GATEWAY, Tls, TlsFiles, read_tls
from tests.support.certificates import write_certificates
from tests.support.processes import Cluster, running_cluster
from tests.support.tiny_cluster import write_tiny_cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, str]:
    return write_certificates(load_cluster(str(write_tiny_cluster(folder))), folder / "certificates")


@pytest.fixture(scope="module")
def cluster(folder: Path, files: dict[str, str]) -> Iterator[Cluster]:
    file = folder / "cluster.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tls": files}))
    with running_cluster(file, folder / "run") as cluster:
        yield cluster


def loaded(files: dict[str, str], name: str = GATEWAY) -> Tls:
    return read_tls(TlsFiles(**files), Path(), name)


def test_answer_passes_both_hops_over_tls(cluster: Cluster) -> None:
    answer = cluster.generate("stitch", route="strong", max_tokens=8, ignore_eos=True)
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
