"""Tests of the settings: from flags and cluster file, and which ones a gateway refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router_gateway.config import GatewaySettings, check, from_flags
from stitch.cluster import load_cluster
from stitch.errors import InvalidRequest

FLAGS: dict[str, Any] = {
    "listen": None,
    "http": None,
    "metrics_port": None,
    "insecure": False,
    "reflection": False,
    "drain_seconds": None,
    "replay_wait_seconds": None,
}

CLUSTER = """
name = "two"
[models]
bottom = { id = "a", source = "a" }
top = { id = "a", source = "a" }
[[routes]]
name = "strong"
bottom_layers = 4
top_from = 4
[[shards]]
name = "b"
role = "bottom"
layers = [0, 4]
address = "127.0.0.1:7001"
[[shards]]
name = "t"
role = "top"
layers = [4, 8]
address = "127.0.0.1:7002"
[gateway]
address = "127.0.0.1:7000"
"""


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def settings(cluster_file: Path, **fields: Any) -> GatewaySettings:
    return GatewaySettings(cluster=load_cluster(str(cluster_file)), **fields)


def test_check_refuses_an_exposed_address_without_insecure(cluster_file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"listen is '0\.0\.0\.0:7000', but .* --insecure"):
        check(settings(cluster_file, listen="0.0.0.0:7000"))
    check(settings(cluster_file, listen="0.0.0.0:7000", insecure=True))
    check(settings(cluster_file))


def test_check_refuses_an_exposed_http_port_without_insecure(cluster_file: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"http is '0\.0\.0\.0:8000', but .* --insecure"):
        check(settings(cluster_file, http="0.0.0.0:8000"))
    with pytest.raises(InvalidRequest, match=r"http is '8000', but it must be host:port"):
        check(settings(cluster_file, http="8000"))
    check(settings(cluster_file, http="0.0.0.0:8000", insecure=True))
    check(settings(cluster_file, http="127.0.0.1:8000"))


@pytest.mark.parametrize("by", ['keys = "k.toml"\n', 'client_authority = "a.pem"\n', None])
def test_check_refuses_an_exposed_gateway_that_asks_nobody_who_he_is(cluster_file: Path, by: str | None) -> None:
    tls = '[tls]\nauthority = "a"\ncertificate = "c"\nkey = "k"\n'
    keys, authority = (by if by and by.startswith(field) else "" for field in ("keys", "client"))
    cluster_file.write_text(CLUSTER + keys + tls + authority)
    given = settings(cluster_file, listen="0.0.0.0:7000")
    if by is None:
        with pytest.raises(InvalidRequest, match=r"everybody may ask there: set .* keys or .* client_authority"):
            check(given)
        given = settings(cluster_file, listen="0.0.0.0:7000", insecure=True)
    check(given)


def test_check_refuses_exposed_metrics_without_insecure(cluster_file: Path) -> None:
    cluster_file.write_text(CLUSTER + 'metrics_port = 9\nmetrics_host = "10.0.0.1"\n')
    with pytest.raises(InvalidRequest, match=r"metrics_host is '10\.0\.0\.1:9', but .* --insecure"):
        check(settings(cluster_file))
    check(settings(cluster_file, insecure=True))
    assert settings(cluster_file, metrics_port=8).metrics_address == "10.0.0.1:8"


def test_reflection_is_answered_on_loopback_or_by_its_flag(cluster_file: Path) -> None:
    assert settings(cluster_file).reflects
    assert not settings(cluster_file, listen="0.0.0.0:7000").reflects
    assert settings(cluster_file, listen="0.0.0.0:7000", reflection=True).reflects


@pytest.mark.parametrize("address", ["7000", "localhost", "localhost:http", ":7000"])
def test_check_refuses_an_address_without_host_or_port(cluster_file: Path, address: str) -> None:
    with pytest.raises(InvalidRequest, match="host:port"):
        check(settings(cluster_file, listen=address))


def test_check_refuses_shards_without_port() -> None:
    with pytest.raises(InvalidRequest, match=r"shards\.bottom-0\.address"):
        check(GatewaySettings(cluster=load_cluster("smollm2")))


def test_check_refuses_thresholds_of_other_routes(cluster_file: Path) -> None:
    cluster_file.write_text(f"{CLUSTER}\nthresholds = [0.5]\n")
    with pytest.raises(InvalidRequest, match=r"gateway\.thresholds"):
        check(settings(cluster_file))


def test_flags_override_the_cluster_file(cluster_file: Path) -> None:
    given = {"cluster": str(cluster_file), "listen": "127.0.0.1:1", "metrics_port": 9, "replay_wait_seconds": 2.5}
    read = from_flags(FLAGS | given)
    assert (read.address, read.host, read.metrics_port) == ("127.0.0.1:1", "127.0.0.1", 9)
    assert read.retry.wait_seconds == 2.5


def test_settings_without_flags_are_those_of_the_file(cluster_file: Path) -> None:
    read = from_flags(FLAGS | {"cluster": str(cluster_file)})
    assert read.address == "127.0.0.1:7000"
    assert read == settings(cluster_file)


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("drain_seconds", -1.0, "drain_seconds"),
        ("replay_wait_seconds", -1.0, "retry.wait_seconds"),
        ("metrics_port", 70_000, "metrics_port"),
    ],
)
def test_from_flags_names_an_invalid_value(cluster_file: Path, flag: str, value: float, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_flags(FLAGS | {"cluster": str(cluster_file), flag: value})
    assert caught.value.field == field
