"""Loading of certificates, and the addresses that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitch.errors import InvalidRequest
from stitch.tls import TlsFiles, check_exposure, gateway_credentials, is_loopback, load_tls
from tests.support.certificates import write_certificates


def test_load_tls_reads_files_relative_to_folder(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    names = TlsFiles(authority="authority.pem", certificate="certificate.pem", key="key.pem")
    tls = load_tls(names, tmp_path)
    assert tls is not None
    assert tls.authority == (tmp_path / "authority.pem").read_bytes()
    assert load_tls(None, tmp_path) is None


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "it can't be read: No such file"), (b"\x30\x82", "it is no PEM file")]
)
def test_load_tls_names_field_of_unusable_file(tmp_path: Path, content: bytes | None, reason: str) -> None:
    files = write_certificates(tmp_path) | {"key": str(tmp_path / "other.pem")}
    if content is not None:
        (tmp_path / "other.pem").write_bytes(content)
    with pytest.raises(InvalidRequest, match=rf"tls\.key is '.*, but {reason}"):
        load_tls(TlsFiles(**files), Path())


def test_gateway_credentials_name_missing_authority(tmp_path: Path) -> None:
    assert gateway_credentials(None) is None
    with pytest.raises(InvalidRequest, match=r"authority is '.*, but it can't be read"):
        gateway_credentials(tmp_path / "gone.pem")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("192.168.1.5", False),
        ("localhost.example.org", False),
    ],
)
def test_is_loopback_is_true_for_addresses_of_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_check_exposure_refuses_open_address_without_tls_or_insecure() -> None:
    with pytest.raises(InvalidRequest, match=r"listen is '0\.0\.0\.0:7', but .*--insecure allows it"):
        check_exposure("listen", "0.0.0.0:7", secured=False, insecure=False)
    check_exposure("listen", "0.0.0.0:7", secured=False, insecure=True)
    check_exposure("listen", "0.0.0.0:7", secured=True, insecure=False)
    check_exposure("listen", "127.0.0.1:7", secured=False, insecure=False)
