"""Writes the certificates of a new authority for one test."""

from __future__ import annotations

from pathlib import Path

import trustme


def write_certificates(folder: Path, host: str = "127.0.0.1") -> dict[str, str]:
    """Makes an authority and a certificate for `host`; returns the `tls` section with their files."""
    authority = trustme.CA()
    issued = authority.issue_cert(host)
    files = {name: folder / f"{name}.pem" for name in ("authority", "certificate", "key")}
    authority.cert_pem.write_to_path(files["authority"])
    files["certificate"].write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(files["key"])
    return {name: str(path) for name, path in files.items()}
