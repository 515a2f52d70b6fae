"""Certificates that can't be used are named before anything listens."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch.tls import TlsFiles, gateway_credentials, load_tls
from tests.support.certificates import write_certificates


def test_files_are_relative_to_the_cluster_s(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    names = TlsFiles(authority="authority.pem", certificate="certificate.pem", key="key.pem")
    tls = load_tls(names, tmp_path)
    assert tls is not None
    assert tls.authority == (tmp_path / "authority.pem").read_bytes()
    assert load_tls(None, tmp_path) is None


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "it can't be read: No such file"), (b"\x30\x82", "it is no PEM file")]
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    files = write_certificates(tmp_path) | {"key": str(tmp_path / "other.pem")}
    if content is not None:
        (tmp_path / "other.pem").write_bytes(content)
    with pytest.raises(InvalidRequest, match=rf"tls\.key is '.*, but {reason}"):
        load_tls(TlsFiles(**files), Path())


def test_a_client_s_authority_is_named(tmp_path: Path) -> None:
    assert gateway_credentials(None) is None
    with pytest.raises(InvalidRequest, match=r"authority is '.*, but it can't be read"):
        gateway_credentials(tmp_path / "gone.pem")
