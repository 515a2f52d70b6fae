"""HTTPS where the cluster has certificates: what the gateway shows, and which clients it takes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from router_gateway.config import GatewaySettings
from router_gateway.server import Gateway, open_gateway
from stitch.identity import Identity
from stitch.issuing import Authority, Issued, new_authority
from stitch.tls import TlsFiles
from tests.support.certificates import write_certificates
from tests.support.fake_shard import FakeShard, fake_cluster

DAY = timedelta(days=1)
HOST = "127.0.0.1"


@asynccontextmanager
async def served(folder: Path, keys: str | None = None, **tls: str) -> AsyncIterator[Gateway]:
    """A gateway whose shards are never reached: they have no certificates."""
    shards = FakeShard("bottom-0", "bottom"), FakeShard("top-0", "top")
    async with fake_cluster(*shards, http=f"{HOST}:0", keys=keys) as cluster:
        files = write_certificates(cluster, folder / "cluster")
        secured = cluster.model_copy(update={"tls": TlsFiles.model_validate({**files, **tls, "reload_seconds": 0.01})})
        async with open_gateway(GatewaySettings(cluster=secured)) as gateway:
            yield gateway


@asynccontextmanager
async def client(gateway: Gateway, authority: bytes, own: Path | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    context = ssl.create_default_context(cadata=authority.decode())
    if own is not None:
        context.load_cert_chain(own)
    async with httpx2.AsyncClient(base_url=f"https://{HOST}:{gateway.http_port}", verify=context, timeout=20) as opened:
        yield opened


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def shown_by(issued: Issued) -> bytes:
    return issued.certificate + issued.key


async def test_new_connections_take_a_certificate_that_has_changed(tmp_path: Path) -> None:
    old, new = new_authority("old", DAY), new_authority("new", DAY)

    def write(authority: Authority) -> None:
        own = authority.issue(Identity("public", "gateway", "any"), (HOST,), DAY)
        written(tmp_path, "public.pem", own.certificate)
        written(tmp_path, "public-key.pem", own.key)

    write(old)
    names = {"public_certificate": "public.pem", "public_key": "public-key.pem"}
    async with served(tmp_path, **{field: str(tmp_path / name) for field, name in names.items()}) as gateway:
        async with client(gateway, old.pem.certificate) as first:
            assert (await first.get("/health")).status_code == 200
            write(new)
            async with asyncio.timeout(20):
                while not await _connects(gateway, new.pem.certificate):
                    pass
            # An open connection keeps the certificate with which it was opened.
            assert (await first.get("/health")).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            async with client(gateway, old.pem.certificate) as late:
                await late.get("/health")


async def _connects(gateway: Gateway, authority: bytes) -> bool:
    try:
        async with client(gateway, authority) as trying:
            return (await trying.get("/health")).status_code == 200
    except httpx2.ConnectError:
        return False


async def test_tenant_is_known_by_its_certificate_until_that_is_revoked(tmp_path: Path) -> None:
    clients, others = new_authority("clients", DAY), new_authority("others", DAY)
    alice = clients.issue(Identity("any", "client", "alice"), ("alice.example",), DAY)
    bob = clients.issue(Identity("any", "client", "bob"), (), DAY)
    stranger = others.issue(Identity("any", "client", "alice"), ("alice.example",), DAY)
    keys = written(tmp_path, "keys.toml", b'[tenants.alice]\ncertificates = ["alice.example"]\n')
    revoked = written(tmp_path, "revoked", b"")
    authority = written(tmp_path, "clients.pem", clients.pem.certificate)
    async with served(tmp_path, str(keys), client_authority=str(authority), revoked=str(revoked)) as gateway:
        trusted = (tmp_path / "cluster/authority.pem").read_bytes()
        for own in (None, written(tmp_path, "stranger.pem", shown_by(stranger))):
            with pytest.raises((httpx2.ConnectError, httpx2.ReadError, httpx2.RemoteProtocolError)):
                async with client(gateway, trusted, own) as refused:
                    await refused.get("/v1/models")
        async with client(gateway, trusted, written(tmp_path, "bob.pem", shown_by(bob))) as other:
            assert (await other.get("/v1/models")).status_code == 401
        async with client(gateway, trusted, written(tmp_path, "alice.pem", shown_by(alice))) as known:
            assert (await known.get("/v1/models")).status_code == 200
            revoked.write_bytes(f"{alice.serial:x}\n".encode())
            async with asyncio.timeout(20):
                while (reply := await known.get("/v1/models")).status_code == 200:
                    pass
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "permission_denied")
