"""Metrics over HTTP on loopback, and over HTTPS to programs of the cluster elsewhere."""

from __future__ import annotations

import asyncio
import logging
import ssl
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from stitch.certificates import Certificates
from stitch.cli.certs import CertificateSet
from stitch.cluster import load_cluster
from stitch.metrics_server import serving_metrics
from stitch.tls import TlsFiles
from tests.support.certificates import write_certificates
from tests.support.waiting import eventually

CLUSTER = load_cluster("smollm2")
EVERYWHERE = "0.0.0.0:0"


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("stitch_test", "About.", registry=registry).set(7)
    return registry


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    files = TlsFiles(**write_certificates(CLUSTER, tmp_path), reload_seconds=0.01)
    return Certificates(CLUSTER, files, "shard", "bottom-0")


async def page(url: str, folder: Path | None = None, name: str | None = None) -> str:
    """The metrics for a caller with the certificate of that process, or with none."""
    context = None if folder is None else ssl.create_default_context(cafile=folder / "authority.pem")
    if context is not None and folder is not None and name is not None:
        context.load_cert_chain(folder / name / "certificate.pem", folder / name / "key.pem")
    opened = await asyncio.to_thread(urllib.request.urlopen, url, timeout=10, context=context)
    return str(opened.read().decode())


async def test_loopback_needs_no_certificate(registry: CollectorRegistry, certificates: Certificates) -> None:
    async with serving_metrics(registry, "127.0.0.1:0", certificates) as port:
        assert "stitch_test 7.0" in await page(f"http://127.0.0.1:{port}/metrics")
        with pytest.raises(OSError, match="in use"):
            async with serving_metrics(registry, f"127.0.0.1:{port}", None):
                pass


@pytest.mark.parametrize("name", ["prometheus", "gateway", "top-0"])
async def test_programs_of_the_cluster_read_metrics_everywhere(
    registry: CollectorRegistry, certificates: Certificates, tmp_path: Path, name: str
) -> None:
    async with serving_metrics(registry, EVERYWHERE, certificates) as port:
        assert "stitch_test 7.0" in await page(f"https://127.0.0.1:{port}/metrics", tmp_path, name)


async def test_others_read_no_metrics(
    registry: CollectorRegistry, certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = CLUSTER.model_copy(update={"name": "foreign"})
    list(CertificateSet(foreign, tmp_path, timedelta(days=1)).write(renew=["top-0"]))
    async with serving_metrics(registry, EVERYWHERE, certificates) as port:
        for url, name in (("http", None), ("https", None), ("https", "top-0")):
            with pytest.raises((OSError, urllib.error.URLError)):
                await page(f"{url}://127.0.0.1:{port}/metrics", tmp_path, name)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 3
    assert "names no gateway or monitor or shard of cluster smollm2" in lines[-1]


async def test_silent_caller_delays_nobody(
    registry: CollectorRegistry, certificates: Certificates, tmp_path: Path
) -> None:
    async with serving_metrics(registry, EVERYWHERE, certificates) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(page(f"https://127.0.0.1:{port}/metrics", tmp_path, "prometheus"), 5)
        writer.close()


async def test_renewed_certificate_is_shown(
    registry: CollectorRegistry, certificates: Certificates, tmp_path: Path
) -> None:
    async with serving_metrics(registry, EVERYWHERE, certificates) as port:
        before = await shown(port, tmp_path)
        following = asyncio.create_task(certificates.follow())
        list(CertificateSet(CLUSTER, tmp_path, timedelta(days=1)).write(renew=["bottom-0"]))
        await eventually(lambda: certificates.version == 1)
        following.cancel()
        assert await shown(port, tmp_path) != before


async def shown(port: int, folder: Path) -> bytes | None:
    """The certificate that the server shows."""
    context = ssl.create_default_context(cafile=folder / "authority.pem")
    context.load_cert_chain(folder / "prometheus" / "certificate.pem", folder / "prometheus" / "key.pem")
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return certificate
