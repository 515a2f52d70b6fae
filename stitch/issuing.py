"""Makes an authority and the certificates that it signs, for `stitch certs`.

In: identities, host names, days of validity. Out: PEM. It writes no file.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stitch.identity import Identity

# A clock that is slow by less than this still finds a new certificate valid.
CLOCK_TOLERANCE = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.certificate).serial_number


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> Issued:
        return Issued(self.certificate.public_bytes(Encoding.PEM), _key_pem(self.key))

    def issue(self, identity: Identity, hosts: Iterable[str], valid: timedelta) -> Issued:
        """A certificate of this identity, and of these host names and IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(identity.uri), *map(_general_name, (identity.host, *hosts))]
        # A client or a monitor listens nowhere.
        listens = [ExtendedKeyUsageOID.SERVER_AUTH] if identity.role in ("shard", "gateway") else []
        builder = (
            _builder(f"{identity.role} {identity.name}"[:64], key, valid)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([*listens, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(_key_identifier(self.key), critical=False)
        )
        return Issued(builder.sign(self.key, SHA256()).public_bytes(Encoding.PEM), _key_pem(key))


def new_authority(cluster: str, valid: timedelta) -> Authority:
    """A new authority for one cluster."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"authority of {cluster}"[:64]
    builder = (
        _builder(name, key, valid)
        .issuer_name(_named(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(builder.sign(key, SHA256()), key)


def load_authority(pem: Issued) -> Authority:
    """An authority from its PEM. Raises ValueError where it is none."""
    key = load_pem_private_key(pem.key, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("its key is on no elliptic curve")
    return Authority(x509.load_pem_x509_certificate(pem.certificate), key)


def _builder(common_name: str, key: ec.EllipticCurvePrivateKey, valid: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_named(common_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + valid) - CLOCK_TOLERANCE)
        .not_valid_after(now + valid)
    )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _usage(**purposes: bool) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{purpose: purposes.get(purpose, False) for purpose in every})


def _key_identifier(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
