"""`stitch certs` writes a working set of certificates, keeps what exists, and renews what it is told to."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509

from stitch.certificates import Certificates
from stitch.cli.certs import SECTION
from stitch.cli.main import main
from stitch.cluster import load_cluster
from stitch.identity import read_certificate
from stitch.tls import TlsFiles

CLUSTER = "deploy/compose.toml"
PROCESSES = ("bottom-0", "top-0", "gateway", "prometheus")


def certs(out: Path, *flags: str) -> int:
    return main(["certs", CLUSTER, "--out", str(out), *flags])


def names(file: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_every_process_gets_a_certificate_of_its_names(tmp_path: Path) -> None:
    assert certs(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*PROCESSES, "authority.pem", "authority-key.pem"}
    cluster = "smollm2-compose"
    assert names(tmp_path / "top-0" / "certificate.pem") == [
        f"stitch://{cluster}/shard/top-0",
        f"top-0.shard.{cluster}.stitch",
        "top",
    ]
    assert names(tmp_path / "gateway" / "certificate.pem")[2:] == ["gateway", "localhost"]


def test_printed_section_makes_usable_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = load_cluster(CLUSTER).model_copy(update={"tls": None})
    certs(tmp_path, "--days", "7")
    printed = capsys.readouterr().out
    assert "stitch://smollm2-compose/shard/top-0  until " in printed
    section = printed.partition("its section:\n")[2] or SECTION.format(folder=tmp_path)
    files = TlsFiles(**tomllib.loads(section)["tls"])
    for role, name in ("shard", "bottom-0"), ("shard", "top-0"), ("gateway", "gateway"):
        assert Certificates(cluster, files, role, name).version == 0


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    certs(tmp_path, "--client", "alice")
    keys = [*tmp_path.rglob("*key.pem"), tmp_path / "alice.pem"]
    assert len(keys) == len(PROCESSES) + 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys} == {0o600}
    assert read_certificate((tmp_path / "alice.pem").read_bytes()).uris == ("stitch://smollm2-compose/client/alice",)


def test_second_run_keeps_what_exists_and_renews_what_is_named(tmp_path: Path) -> None:
    certs(tmp_path)
    first = contents(tmp_path)
    certs(tmp_path)
    assert contents(tmp_path) == first
    certs(tmp_path, "--renew", "top-0", "--host", "top-0=top.example")
    changed = {name for name, content in contents(tmp_path).items() if content != first[name]}
    assert changed == {"top-0/certificate.pem", "top-0/key.pem"}
    assert names(tmp_path / "top-0" / "certificate.pem")[-1] == "top.example"
    certs(tmp_path, "--renew")
    unchanged = {name for name, content in contents(tmp_path).items() if content == first[name]}
    assert unchanged == {name for name in first if "authority" in name}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.pem")}


@pytest.mark.parametrize("flags", [("--renew", "top-7"), ("--host", "top-7=a")])
def test_unknown_process_is_refused(tmp_path: Path, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert certs(tmp_path, *flags) == 1
    assert "is 'top-7', but the cluster has bottom-0, top-0, gateway, prometheus" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_broken_authority_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certs(tmp_path)
    (tmp_path / "authority-key.pem").write_text("-----BEGIN PRIVATE KEY-----\nMIG\n")
    assert certs(tmp_path, "--renew") == 1
    assert "authority is" in capsys.readouterr().err
