"""Writes the certificates of a new authority for the processes of one test's cluster."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from stitch.cli.certs import CertificateSet
from stitch.cluster import ClusterConfig

FIELDS = ("authority", "certificate", "key")


def write_certificates(cluster: ClusterConfig, folder: Path, valid: timedelta = timedelta(days=1)) -> dict[str, str]:
    """Makes an authority and a certificate for every process; returns the fields of the section `tls`."""
    list(CertificateSet(cluster, folder, valid).write())
    return tls_section(folder)


def tls_section(folder: Path) -> dict[str, str]:
    """The fields of the section `tls` for certificates in this folder."""
    return {field: str(folder / "{name}" / f"{field}.pem") for field in FIELDS}
