"""Loading of certificates, and the addresses that need them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest
from stitch.tls import TlsFiles, check_exposure, gateway_credentials, is_loopback, load_tls, read_tls
from tests.support.certificates import write_certificates


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return TlsFiles(**write_certificates(load_cluster("smollm2"), tmp_path))


def test_read_tls_reads_the_files_of_the_named_program(files: TlsFiles, tmp_path: Path) -> None:
    top = read_tls(files, Path(), "top-0")
    assert top.certificate == (tmp_path / "top-0" / "certificate.pem").read_bytes()
    assert top.key != read_tls(files, Path(), "bottom-0").key
    assert load_tls(None, tmp_path, "top-0") is None


def test_read_tls_reads_files_relative_to_the_folder(tmp_path: Path) -> None:
    write_certificates(load_cluster("smollm2"), tmp_path)
    names = TlsFiles(authority="authority.pem", certificate="top-0/certificate.pem", key="top-0/key.pem")
    assert read_tls(names, tmp_path, "bottom-0").authority == (tmp_path / "authority.pem").read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "it can't be read: No such file"), (b"\x30\x82", "it is no PEM file")]
)
def test_read_tls_names_field_of_unusable_file(
    files: TlsFiles, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "other.pem").write_bytes(content)
    other = files.model_copy(update={"key": str(tmp_path / "other.pem")})
    with pytest.raises(InvalidRequest, match=rf"tls\.key is '.*, but {reason}"):
        read_tls(other, Path(), "top-0")


@pytest.mark.parametrize(
    "fields", [{"public_certificate": "p.pem"}, {"public_key": "k.pem"}, {"public_authority": "a.pem"}]
)
def test_public_files_need_each_other(files: TlsFiles, fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="need"):
        TlsFiles.model_validate(files.model_dump() | fields)


def test_client_certificate_needs_an_authority(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="it needs the authority"):
        gateway_credentials(None, tmp_path / "alice.pem")


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
