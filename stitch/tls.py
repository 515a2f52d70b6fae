"""The certificates of both ends of a connection between machines, and the rule for ports without them.

Every program shows its own certificate and trusts those that one authority has signed. A shard accepts only callers
with such a certificate; a gateway's clients need none of their own. gRPC checks that a certificate names the host that
was called. This module reads files and opens no connection.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from stitch.errors import InvalidRequest
from stitch.settings import Settings


class TlsFiles(Settings):
    """PEM files, relative to the cluster file; every machine has its own under these names."""

    # The certificate authority that programs trust.
    authority: str
    # The certificate of this machine's programs, with any intermediate certificates up to the authority.
    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Tls:
    """One program's certificates, as PEM."""

    authority: bytes
    certificate: bytes
    key: bytes

    def client(self) -> grpc.ChannelCredentials:
        """The credentials with which a program calls a shard."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def server(self, mutual: bool) -> grpc.ServerCredentials:
        """The credentials of a server; where `mutual`, its callers must show a certificate of the authority, too."""
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, self.authority if mutual else None, require_client_auth=mutual)


def load_tls(files: TlsFiles | None, folder: Path) -> Tls | None:
    """The certificates in `files`; raises InvalidRequest for a file that can't be read or is no PEM."""
    if files is None:
        return None
    return Tls(**{field: read_pem(f"tls.{field}", folder / name) for field, name in files})


def gateway_credentials(authority: Path | None) -> grpc.ChannelCredentials | None:
    """The credentials of a gateway's client that trusts this authority; None: it connects without TLS."""
    return None if authority is None else grpc.ssl_channel_credentials(read_pem("authority", authority))


def read_pem(field: str, path: Path) -> bytes:
    """The content of a PEM file; raises InvalidRequest with the name of the field."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(field, str(path), f"it can't be read: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise InvalidRequest(field, str(path), "it is no PEM file")
    return content


def check_exposure(field: str, address: str, secured: bool, insecure: bool) -> None:
    """Raises InvalidRequest where other machines reach `host:port` without TLS and `insecure` doesn't allow it."""
    if not secured and not insecure and not is_loopback(address.rpartition(":")[0]):
        limit = "other machines reach it without TLS: the cluster file needs [tls], or --insecure allows it"
        raise InvalidRequest(field, address, limit)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost may belong to any machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
