"""A gateway's own certificates: what it shows to clients, and which clients it takes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from router_gateway.config import GatewaySettings
from router_gateway.server import Gateway, open_gateway
from stitch.access import REFUSED
from stitch.client import AsyncClient
from stitch.cluster import ClusterConfig
from stitch.errors import Forbidden, Unavailable
from stitch.identity import Identity
from stitch.issuing import Issued, new_authority
from stitch.tls import TlsFiles
from tests.support.certificates import write_certificates
from tests.support.fake_shard import FakeShard, fake_cluster
from tests.support.waiting import eventually

DAY = timedelta(days=1)
HOST = "127.0.0.1"


@dataclass
class Served:
    """A gateway, with a folder for the files of its clients."""

    gateway: Gateway
    cluster: ClusterConfig
    folder: Path

    @property
    def authority(self) -> bytes:
        return (self.folder / "cluster" / "authority.pem").read_bytes()

    async def describe(self, authority: bytes, own: Issued | None = None) -> str:
        """The cluster's name for a client that trusts this authority and shows this certificate."""
        trusted, shown = self.folder / "trusted.pem", self.folder / "own.pem"
        trusted.write_bytes(authority)
        shown.write_bytes(b"" if own is None else own.certificate + own.key)
        address = f"{HOST}:{self.gateway.port}"
        async with AsyncClient(address, trusted, certificate=None if own is None else shown) as client:
            return (await client.describe(timeout=10)).cluster


@asynccontextmanager
async def served(folder: Path, **tls: object) -> AsyncIterator[Served]:
    async with fake_cluster(FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")) as cluster:
        files = write_certificates(cluster, folder / "cluster")
        secured = cluster.model_copy(update={"tls": TlsFiles.model_validate({**files, **tls, "reload_seconds": 0.01})})
        async with open_gateway(GatewaySettings(cluster=secured)) as gateway:
            yield Served(gateway, secured, folder)


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


async def test_gateway_shows_its_public_certificate_to_clients(tmp_path: Path) -> None:
    public = new_authority("public", DAY)
    own = public.issue(Identity("public", "gateway", "any"), (HOST,), DAY)
    files = {
        "public_certificate": written(tmp_path, "public.pem", own.certificate),
        "public_key": written(tmp_path, "public-key.pem", own.key),
        "public_authority": written(tmp_path, "public-authority.pem", public.pem.certificate),
    }
    async with served(tmp_path, **files) as gateway:
        assert await gateway.describe(public.pem.certificate) == "fake"
        with pytest.raises(Unavailable):
            await gateway.describe(gateway.authority)
        assert gateway.cluster.gateway_endpoint[1] == tmp_path / "public-authority.pem"


async def test_clients_need_a_certificate_where_their_authority_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clients, others = new_authority("clients", DAY), new_authority("others", DAY)
    revoked = written(tmp_path, "revoked", b"")
    files = {"client_authority": written(tmp_path, "clients.pem", clients.pem.certificate), "revoked": revoked}
    alice = clients.issue(Identity("any", "client", "alice"), (), DAY)
    stranger = others.issue(Identity("fake", "client", "alice"), (), DAY)
    async with served(tmp_path, **files) as gateway:
        assert await gateway.describe(gateway.authority, alice) == "fake"
        for own in (None, stranger):
            with pytest.raises(Unavailable):
                await gateway.describe(gateway.authority, own)
        written(tmp_path, "revoked", f"{alice.serial:x}\n".encode())
        await eventually(lambda: "the files of [tls] have changed" in caplog.text)
        with pytest.raises(Forbidden, match=REFUSED):
            await gateway.describe(gateway.authority, alice)
