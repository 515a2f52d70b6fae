"""Certificates that both ends of a connection between machines show. Reads files and opens no connection.

Every program shows its own certificate and believes those that one authority has signed. Shards talk to nobody else;
a gateway's clients need none of their own. gRPC checks that a certificate names the host that was called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from stitch.errors import InvalidRequest
from stitch.settings import Settings


class TlsFiles(Settings):
    """PEM files, relative to the cluster file; every machine has its own under these names."""

    # Whose signature is believed.
    authority: str
    # What this machine's programs show, with all that stands between it and the authority.
    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Tls:
    """One program's certificates, as PEM."""

    authority: bytes
    certificate: bytes
    key: bytes

    def client(self) -> grpc.ChannelCredentials:
        """For whoever calls a shard."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def server(self, mutual: bool) -> grpc.ServerCredentials:
        """For whoever is called; `mutual`: only by those who show a certificate, too."""
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, self.authority if mutual else None, require_client_auth=mutual)


def load_tls(files: TlsFiles | None, folder: Path) -> Tls | None:
    """Raises InvalidRequest for a file that can't be read or is no PEM."""
    if files is None:
        return None
    return Tls(**{field: read_pem(f"tls.{field}", folder / name) for field, name in files})


def gateway_credentials(authority: Path | None) -> grpc.ChannelCredentials | None:
    """For a gateway's client that believes this authority; None: it connects in the clear."""
    return None if authority is None else grpc.ssl_channel_credentials(read_pem("authority", authority))


def read_pem(field: str, path: Path) -> bytes:
    """Raises InvalidRequest, which names the field."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(field, str(path), f"it can't be read: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise InvalidRequest(field, str(path), "it is no PEM file")
    return content
