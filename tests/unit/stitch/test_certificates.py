"""One program's certificates: what is refused at start, and what counts after their files change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from prometheus_client import CollectorRegistry

from stitch.certificates import Certificates, revocations
from stitch.channels import open_server
from stitch.cli.certs import CertificateSet
from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch.identity import read_certificate
from stitch.tls import TlsFiles
from tests.support.certificates import write_certificates
from tests.support.listening import listening
from tests.support.waiting import eventually

CLUSTER = load_cluster("smollm2")
DAY = timedelta(days=1)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return TlsFiles(**write_certificates(CLUSTER, tmp_path), reload_seconds=0.01)


def shard(files: TlsFiles, name: str = "top-0") -> Certificates:
    return Certificates(CLUSTER, files, "shard", name)


def renew(folder: Path, name: str, valid: timedelta = DAY) -> None:
    list(CertificateSet(CLUSTER, folder, valid).write(renew=[name]))


@asynccontextmanager
async def following(certificates: Certificates) -> AsyncIterator[None]:
    task = asyncio.create_task(certificates.follow())
    try:
        yield
    finally:
        task.cancel()


async def test_renewed_certificate_counts_and_is_reported(files: TlsFiles, tmp_path: Path) -> None:
    certificates, changes = shard(files), []
    certificates.on_change.append(lambda: changes.append(certificates.version))
    async with following(certificates):
        renew(tmp_path, "top-0")
        await eventually(lambda: changes == [1])
    assert certificates.current.certificate == (tmp_path / "top-0" / "certificate.pem").read_bytes()


def copied(source: str, *files: str) -> Callable[[Path], None]:
    """Makes the files of `top-0` those of another process."""

    def copy(folder: Path) -> None:
        for file in files:
            (folder / "top-0" / file).write_bytes((folder / source / file).read_bytes())

    return copy


def from_another_authority(folder: Path) -> None:
    write_certificates(CLUSTER, folder / "other")
    copied("other/top-0", "certificate.pem", "key.pem")(folder)


def written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "top-0" / file).write_bytes(content)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "the key alone": (copied("bottom-0", "key.pem"), "it is not the key of the certificate beside it"),
    "the certificate alone": (copied("bottom-0", "certificate.pem"), "it is not the key of the certificate beside it"),
    "half a certificate": (written("certificate.pem", b"-----BEGIN CERTIFICATE-----\nMIIB"), "it has no certificate"),
    "half a key": (written("key.pem", b"-----BEGIN PRIVATE KEY-----\nMIG"), "it has no private key"),
    "no certificate": (lambda folder: (folder / "top-0" / "certificate.pem").unlink(), "it can't be read"),
    "another shard's": (copied("bottom-0", "certificate.pem", "key.pem"), "it must name stitch://smollm2/shard/top-0"),
    "the gateway's": (copied("gateway", "certificate.pem", "key.pem"), "it must name stitch://smollm2/shard/top-0"),
    "another authority's": (from_another_authority, "tls.authority has not signed it"),
    "an expired one": (lambda folder: renew(folder, "top-0", valid=-DAY), "that time has passed"),
}


@pytest.mark.parametrize("change", UNUSABLE)
def test_unusable_files_are_refused_at_start(files: TlsFiles, tmp_path: Path, change: str) -> None:
    make, reason = UNUSABLE[change]
    make(tmp_path)
    with pytest.raises(InvalidRequest, match=reason):
        shard(files)


@pytest.mark.parametrize("change", UNUSABLE)
async def test_unusable_change_keeps_the_former_files_and_is_logged_once(
    files: TlsFiles, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = UNUSABLE[change]
    certificates = shard(files)
    before = certificates.current
    make(tmp_path)
    readings = 0
    read = certificates._read

    def counted() -> object:
        nonlocal readings
        readings += 1
        return read()

    certificates._read = counted  # type: ignore[assignment]
    async with following(certificates):
        await eventually(lambda: readings > 5)
    assert certificates.current is before
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert reason in line


async def test_gateway_may_have_any_name(files: TlsFiles) -> None:
    assert Certificates(CLUSTER, files, "gateway", "gateway").version == 0


async def test_list_of_revoked_certificates_is_read_again(files: TlsFiles, tmp_path: Path) -> None:
    listed = tmp_path / "revoked"
    listed.write_text("# nobody yet\n")
    certificates = shard(files.model_copy(update={"revoked": str(listed)}))
    bottom = read_certificate((tmp_path / "bottom-0" / "certificate.pem").read_bytes())
    assert not certificates.is_revoked(bottom)
    async with following(certificates):
        listed.write_text(f"{bottom.serial:x}  # stolen\n")
        await eventually(lambda: certificates.is_revoked(bottom))
        renew(tmp_path, "bottom-0")
        renewed = read_certificate((tmp_path / "bottom-0" / "certificate.pem").read_bytes())
        assert not certificates.is_revoked(renewed)
        listed.write_text("stitch://smollm2/shard/bottom-0\n")
        await eventually(lambda: certificates.is_revoked(renewed))


def test_revocations_are_serials_and_uris() -> None:
    assert revocations(b"0a:FF\n\nstitch://c/shard/x # lost\n") == {0x0AFF, "stitch://c/shard/x"}
    with pytest.raises(InvalidRequest, match=r"tls\.revoked is 'bottom-0', but a line is a serial number"):
        revocations(b"bottom-0")


def test_metric_is_when_each_file_expires(files: TlsFiles) -> None:
    certificates, registry = shard(files), CollectorRegistry()
    certificates.export(registry)
    samples = {one.labels["file"]: one.value for family in registry.collect() for one in family.samples}
    assert set(samples) == {"authority", "certificate"}
    assert 0 < samples["certificate"] - time.time() <= DAY.total_seconds() < samples["authority"] - time.time()


async def test_new_calls_take_a_new_authority_and_running_ones_go_on(files: TlsFiles, tmp_path: Path) -> None:
    write_certificates(CLUSTER, tmp_path / "new")
    both_sides = [shard(files), Certificates(CLUSTER, files, "gateway", "gateway")]
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    async with (
        health_server(both_sides[0]) as (health, address),
        both_sides[1].rotating_channel("top-0", address) as channel,
        following(both_sides[0]),
        following(both_sides[1]),
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert await watch.read() == serving
        for version, step in enumerate((trust_both, take_new_certificates, trust_new_alone), 1):
            step(tmp_path)
            await eventually(lambda version=version: {one.version for one in both_sides} == {version})
            assert await stub.Check(health_pb2.HealthCheckRequest()) == serving
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


@asynccontextmanager
async def health_server(certificates: Certificates) -> AsyncIterator[tuple[HealthServicer, str]]:
    server, health = open_server(options=certificates.server_options), HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    async with listening(server, certificates.to_programs()) as address:
        yield health, address


def trust_both(folder: Path) -> None:
    for name in ("top-0", "gateway"):
        with (folder / name / "authority.pem").open("ab") as file:
            file.write((folder / "new" / "authority.pem").read_bytes())


def take_new_certificates(folder: Path) -> None:
    for name in ("top-0", "gateway"):
        for file in ("key.pem", "certificate.pem"):
            (folder / name / file).write_bytes((folder / "new" / name / file).read_bytes())


def trust_new_alone(folder: Path) -> None:
    for name in ("top-0", "gateway"):
        (folder / name / "authority.pem").write_bytes((folder / "new" / "authority.pem").read_bytes())
