"""Who a process is by its certificate.

A certificate names its process twice. Those whom the process calls read the URI `stitch://CLUSTER/ROLE/NAME`. Those who
call the process let gRPC verify the host name `NAME.ROLE.CLUSTER.stitch`, whatever address they have reached it at.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, get_args

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

# A client may ask a gateway; a monitor may read metrics and health, and nothing else.
Role = Literal["shard", "gateway", "client", "monitor"]
SCHEME = "stitch://"


@dataclass(frozen=True, slots=True)
class Identity:
    """The name and the role of one process in one cluster."""

    cluster: str
    role: Role
    name: str

    @property
    def uri(self) -> str:
        """The URI that names it in its certificate."""
        return f"{SCHEME}{self.cluster}/{self.role}/{self.name}"

    @property
    def host(self) -> str:
        """The host name that its callers verify in gRPC's handshake."""
        return f"{self.name}.{self.role}.{self.cluster}.stitch"


@dataclass(frozen=True, slots=True)
class Peer:
    """What the certificate of the other side of a connection says."""

    serial: int
    expires: datetime
    # The URIs that it names, and those of them that name a process of a cluster.
    uris: tuple[str, ...]
    identities: tuple[Identity, ...]
    # All of its names: URIs, host names, mail addresses, common names.
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people: the first URI, else the first host name, else another."""
        return next(iter(self.names), "")

    def __str__(self) -> str:
        # Shown in logs: the names are the caller's words, so line breaks and escapes in them stay quoted.
        return f"certificate {self.serial:x} of {self.name!r:.200}"


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer | None:
    """What the caller's certificate says, which gRPC has verified; None: it has shown none.

    Raises ValueError for a certificate that can't be read.
    """
    for certificate in context.auth_context().get("x509_pem_cert", ()):
        return read_certificate(certificate)
    return None


@lru_cache(maxsize=1024)
def read_certificate(pem: bytes) -> Peer:
    """What the first certificate in a PEM says. Raises ValueError where there is none."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = tuple(names.get_values_for_type(x509.UniformResourceIdentifier))
        others = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.RFC822Name)]
    except x509.ExtensionNotFound:
        uris, others = (), []
    common = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    identities = tuple(identity for uri in uris if (identity := parse_uri(uri)) is not None)
    expires = certificate.not_valid_after_utc
    return Peer(certificate.serial_number, expires, uris, identities, (*uris, *others, *common))


def parse_uri(uri: str) -> Identity | None:
    """The process that a URI names; None where it names none."""
    cluster, _, rest = uri.removeprefix(SCHEME).partition("/")
    role, _, name = rest.partition("/")
    if not uri.startswith(SCHEME) or role not in get_args(Role) or not cluster or not name or "/" in name:
        return None
    return Identity(cluster, role, name)  # type: ignore[arg-type]  # a role, by the check above
