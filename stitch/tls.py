"""The certificates of a program as files, the credentials that it makes of them, and the rule for ports without them.

Every program shows its own certificate and trusts those that one authority has signed. gRPC checks chains, dates and
host names; `stitch.access` checks whom a caller's certificate names. This module reads files and opens no connection.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path

import grpc
from pydantic import Field, model_validator

from stitch.errors import InvalidRequest
from stitch.settings import Settings

# The gateway's name among the programs of a cluster.
GATEWAY = "gateway"


class TlsFiles(Settings):
    """PEM files, relative to the cluster file; `{name}` in a path is the shard's name, or `gateway`."""

    # The certificate authorities that programs trust.
    authority: str
    # The certificate of a program, with any intermediate certificates up to the authority.
    certificate: str
    key: str
    # What the gateway shows to clients in place of `certificate`, and the authority that they then trust for it.
    public_certificate: str | None = None
    public_key: str | None = None
    public_authority: str | None = None
    # Clients of the gateway must show a certificate that these authorities, or those of `authority`, have signed.
    client_authority: str | None = None
    # Certificates that are refused although they are valid: a line is a serial in hexadecimal or a URI.
    revoked: str | None = None
    # The files are read again this often.
    reload_seconds: float = Field(default=10.0, gt=0)
    # Calls move to a new connection, with a handshake of its own, at this age; running calls keep theirs.
    max_connection_age_seconds: float = Field(default=3600.0, gt=0)

    @model_validator(mode="after")
    def _public_files_are_complete(self) -> TlsFiles:
        if (self.public_certificate is None) != (self.public_key is None):
            raise ValueError("public_certificate and public_key need each other")
        if self.public_authority is not None and self.public_certificate is None:
            raise ValueError("public_authority needs public_certificate")
        return self

    def trusted_by_clients(self, folder: Path) -> Path | None:
        """The authority that clients of the gateway trust."""
        field = "authority" if self.public_authority is None else "public_authority"
        return self.path(field, folder, GATEWAY)

    def path(self, field: str, folder: Path, name: str) -> Path | None:
        """The file of that field for the program `name`; None where it isn't set."""
        file: str | None = getattr(self, field)
        return None if file is None else folder / file.replace("{name}", name)


@dataclass(frozen=True, slots=True)
class Tls:
    """The content of one program's files; empty where a file isn't set."""

    authority: bytes
    certificate: bytes
    key: bytes
    public_certificate: bytes = b""
    public_key: bytes = b""
    public_authority: bytes = b""
    client_authority: bytes = b""
    revoked: bytes = b""

    def client(self) -> grpc.ChannelCredentials:
        """The credentials with which a program calls a shard."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def gateway_client(self) -> grpc.ChannelCredentials:
        """The credentials with which a program of the cluster calls a gateway."""
        trusted = self.authority + b"\n" + self.public_authority
        return grpc.ssl_channel_credentials(trusted, self.key, self.certificate)

    def among_shards(self) -> grpc.ServerCertificateConfiguration:
        """What a shard shows, and which authorities its callers must have a certificate of."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.authority)

    def to_clients(self) -> grpc.ServerCertificateConfiguration:
        """What a gateway shows, and which authorities its clients must have a certificate of, if any."""
        certificate, key, trusted = self.https_to_clients
        return grpc.ssl_server_certificate_configuration([(key, certificate)], trusted or None)

    @property
    def https_to_clients(self) -> tuple[bytes, bytes, bytes]:
        """The gateway's certificate and key, and the authorities of its clients, which are empty where it takes all."""
        # Programs of the cluster ask for the gateway's health.
        trusted = self.client_authority + b"\n" + self.authority if self.client_authority else b""
        return self.public_certificate or self.certificate, self.public_key or self.key, trusted


def load_tls(files: TlsFiles | None, folder: Path, name: str) -> Tls | None:
    """Like `read_tls`; None where the cluster has no section `tls`."""
    return None if files is None else read_tls(files, folder, name)


def read_tls(files: TlsFiles, folder: Path, name: str) -> Tls:
    """The files of the program `name`; raises InvalidRequest for one that can't be read or is no PEM."""
    paths = {field.name: files.path(field.name, folder, name) for field in fields(Tls)}
    return Tls(**{field: _content(f"tls.{field}", path) for field, path in paths.items() if path is not None})


def gateway_credentials(authority: Path | None, certificate: Path | None = None) -> grpc.ChannelCredentials | None:
    """The credentials of a gateway's client that trusts this authority; None: it connects without TLS.

    `certificate` is a PEM file with the client's own certificate and its key.
    """
    if authority is None:
        if certificate is not None:
            raise InvalidRequest("certificate", str(certificate), "it needs the authority of the gateway's, too")
        return None
    own = None if certificate is None else read_pem("certificate", certificate)
    return grpc.ssl_channel_credentials(read_pem("authority", authority), own, own)


def read_pem(field: str, path: Path) -> bytes:
    """The content of a PEM file; raises InvalidRequest with the name of the field."""
    content = read_file(field, path)
    if b"-----BEGIN " not in content:
        raise InvalidRequest(field, str(path), "it is no PEM file")
    return content


def read_file(field: str, path: Path) -> bytes:
    """The content of a file; raises InvalidRequest with the name of the field."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(field, str(path), f"it can't be read: {error.strerror}") from error


def _content(field: str, path: Path) -> bytes:
    return read_file(field, path) if field == "tls.revoked" else read_pem(field, path)


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
