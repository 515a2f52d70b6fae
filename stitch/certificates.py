"""One program's certificates: checked at start, and read again when their files change.

In: the files of the cluster's section `tls`. Out: credentials that follow the files, for new connections. Files that
are half written, don't belong together or don't name this program change nothing, and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from prometheus_client import CollectorRegistry, Gauge

from stitch.access import CallerPolicy
from stitch.channels import Options, open_channel
from stitch.cluster import ClusterConfig
from stitch.errors import InvalidRequest
from stitch.identity import SCHEME, Identity, Peer, Role, read_certificate
from stitch.rotating_channel import RotatingChannel
from stitch.tls import Tls, TlsFiles, read_tls

_log = logging.getLogger(__name__)

# The fields of certificates, which expire.
DATED = ("authority", "certificate", "public_certificate", "client_authority")


class Certificates:
    """The certificates of one program that count now."""

    def __init__(self, cluster: ClusterConfig, files: TlsFiles, role: Role, name: str) -> None:
        """`name` is the shard's; a gateway's certificate may have any. Raises InvalidRequest for unusable files."""
        self.files = files
        self._cluster = cluster
        self._role = role
        self._name = name
        # Called in the event loop when other files count.
        self.on_change: list[Callable[[], None]] = []
        # How often other files have come to count.
        self.version = 0
        # Who may call, of those that show a certificate.
        self.policy = CallerPolicy(cluster, self.is_revoked)
        self._complaint = ""
        self._read = partial(read_tls, files, cluster.folder, name)
        self.current = self._read()
        self._revoked = self._checked(self.current)

    def is_revoked(self, peer: Peer) -> bool:
        """Whether the list of revoked certificates has the certificate's serial number or one of its URIs."""
        return bool(self._revoked) and not self._revoked.isdisjoint((peer.serial, *peer.uris))

    def to_programs(self) -> grpc.ServerCredentials:
        """The credentials of a server whose callers are programs of the cluster."""
        return self._following(Tls.among_shards, callers_need_certificates=True)

    def to_clients(self) -> grpc.ServerCredentials:
        """The credentials of a gateway."""
        return self._following(Tls.to_clients, self.files.client_authority is not None)

    def https_to_programs(self) -> ssl.SSLContext:
        """The context of an HTTPS server whose callers are programs of the cluster."""
        return self._https(lambda: (self.current.certificate, self.current.key, self.current.authority))

    def https_to_clients(self) -> ssl.SSLContext:
        """The context of a gateway's HTTPS server."""
        return self._https(lambda: self.current.https_to_clients)

    def _https(self, files: Callable[[], tuple[bytes, bytes, bytes]]) -> ssl.SSLContext:
        """A server's context for the certificate, the key and the authority of callers, empty where they need none.

        Each new connection takes the files that count then.
        """
        made = self.version, _https_context(*files())

        def follow(connection: Any, host: object, context: object) -> None:
            # Called in every handshake, whether or not the caller names a host.
            nonlocal made
            if made[0] != self.version:
                made = self.version, _https_context(*files())
            connection.context = made[1]

        context = _https_context(*files())
        context.sni_callback = follow
        return context

    @property
    def server_options(self) -> Options:
        """The options of a server whose callers show certificates: no connection outlives its certificate by much."""
        return [("grpc.max_connection_age_ms", int(1000 * self.files.max_connection_age_seconds))]

    def open_channel(self, shard: str, address: str) -> grpc.aio.Channel:
        """A channel to a shard, which must show a certificate of its name."""
        return open_channel(address, self.current.client(), host=Identity(self._cluster.name, "shard", shard).host)

    def rotating_channel(self, shard: str, address: str) -> grpc.aio.Channel:
        """Like `open_channel`, for the life of a process: when other files count, new calls take them."""
        return RotatingChannel(lambda: self.open_channel(shard, address), lambda: self.version)

    def export(self, registry: CollectorRegistry) -> None:
        """Adds the metric of when certificates expire, which is read at every scrape."""
        name, about = "stitch_tls_certificate_expiry_timestamp_seconds", "When a file's first certificate expires."
        expiry = Gauge(name, about, ["file"], registry=registry)
        for field in DATED:
            if getattr(self.current, field):
                expiry.labels(field).set_function(partial(self.expiry, field))

    def expiry(self, field: str) -> float:
        """When the first certificate of that file expires, in seconds of Unix time."""
        content: bytes = getattr(self.current, field)
        return min(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(content))

    async def follow(self) -> None:
        """Reads the files in an endless loop; they count once two readings agree, since the first may be of a part."""
        previous: Tls | None = None
        while True:
            await asyncio.sleep(self.files.reload_seconds)
            try:
                found = await asyncio.to_thread(self._read)
                if found == self.current:
                    self._complaint = ""
                elif found == previous:
                    self._take(found)
                previous = found
            # Whatever is wrong with the files, they are read again.
            except Exception as error:
                previous = None
                self._complain(str(error))

    def _following(
        self, configuration: Callable[[Tls], grpc.ServerCertificateConfiguration], callers_need_certificates: bool
    ) -> grpc.ServerCredentials:
        """A server's credentials; each new connection takes the files that count then."""
        taken = self.version

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # Called in gRPC's threads before each handshake.
            nonlocal taken
            if taken == self.version:
                return None
            taken = self.version
            return configuration(self.current)

        # None leaves them as they are, which the stubs don't know.
        follow: Any = changed
        return grpc.dynamic_ssl_server_credentials(configuration(self.current), follow, callers_need_certificates)

    def _take(self, found: Tls) -> None:
        self._revoked = self._checked(found)
        self.current = found
        self.version += 1
        _log.info("the files of [tls] have changed: %s", read_certificate(found.certificate))
        for call in self.on_change:
            call()

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            _log.error("the files of [tls] can't be used, so the former ones still count: %s", complaint)
        self._complaint = complaint

    def _checked(self, tls: Tls) -> frozenset[int | str]:
        """What is revoked. Raises InvalidRequest for files that don't belong together, or are another program's."""
        chain, authorities = _chain("certificate", tls.certificate), _chain("authority", tls.authority)
        _check_key("key", tls.key, chain[0])
        if not any(_issued(chain[0], issuer) for issuer in (*chain[1:], *authorities)):
            raise InvalidRequest("tls.certificate", "a file", "tls.authority has not signed it")
        self._check_name(read_certificate(tls.certificate))
        if tls.public_certificate:
            _check_key("public_key", tls.public_key, _chain("public_certificate", tls.public_certificate)[0])
        return revocations(tls.revoked)

    def _check_name(self, own: Peer) -> None:
        if not any(self._is_own(identity) for identity in own.identities):
            wanted = Identity(self._cluster.name, self._role, self._name).uri
            limit = f"it must name {wanted}; `stitch certs` makes one that does"
            raise InvalidRequest("tls.certificate", ", ".join(own.uris), limit)

    def _is_own(self, identity: Identity) -> bool:
        named = identity.name == self._name or self._role == "gateway"
        return named and (identity.cluster, identity.role) == (self._cluster.name, self._role)


def open_certificates(cluster: ClusterConfig, role: Role, name: str) -> Certificates | None:
    """The certificates of a program; None where the cluster has none. Raises InvalidRequest for unusable files."""
    return None if cluster.tls is None else Certificates(cluster, cluster.tls, role, name)


def revocations(content: bytes) -> frozenset[int | str]:
    """The serial numbers and URIs in a list, one a line. Raises InvalidRequest for a line that is neither."""
    words = (line.partition(b"#")[0].strip().decode("utf-8", "replace") for line in content.splitlines())
    return frozenset(_revocation(word) for word in words if word)


def _revocation(word: str) -> int | str:
    if word.startswith(SCHEME):
        return word
    try:
        return int(word.replace(":", ""), 16)
    except ValueError as error:
        limit = f"a line is a serial number in hexadecimal, or a URI that begins with {SCHEME}"
        raise InvalidRequest("tls.revoked", word, limit) from error


def _https_context(certificate: bytes, key: bytes, authority: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if authority:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authority.decode())
    # It takes no other than files.
    with TemporaryDirectory() as folder:
        file = Path(folder, "certificate-and-key.pem")
        file.touch(mode=0o600)
        file.write_bytes(certificate + b"\n" + key)
        context.load_cert_chain(file)
    return context


def _chain(field: str, pem: bytes) -> Sequence[x509.Certificate]:
    """The certificates of a file, of which the first is valid now."""
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InvalidRequest(f"tls.{field}", "a file", f"it has no certificate: {error}") from error
    if chain[0].not_valid_after_utc < datetime.now(UTC):
        raise InvalidRequest(f"tls.{field}", f"valid until {chain[0].not_valid_after_utc}", "that time has passed")
    return chain


def _check_key(field: str, pem: bytes, certificate: x509.Certificate) -> None:
    try:
        public = load_pem_private_key(pem, None).public_key()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"tls.{field}", "a file", f"it has no private key without a password: {error}") from error
    if public != certificate.public_key():
        raise InvalidRequest(f"tls.{field}", "a file", "it is not the key of the certificate beside it")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True
